"""What every stage can be told: how often it is evaluated, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.settings import StageSettings


def settings(**changes):
    return StageSettings(**{"updates": 100, "batch": 2, "optimiser": OptimiserConfig(learning_rate=1e-3)} | changes)


def test_long_runs_are_evaluated_ten_times_short_ones_five_times_and_others_as_often_as_the_stage_wants():
    assert [settings(updates=updates).every(200) for updates in (60, 1_000, 2_000, 2_009, 4_000)] == [12, 200, 200, 200, 400]


@given(st.integers(1, 20_000), st.integers(25, 400))
def test_whether_a_run_converged_can_be_told(updates, usual):
    """For that an evaluation is needed at or before 80% of the updates; one update alone has none before it."""
    every = settings(updates=updates).every(usual)
    evaluated = [*range(every, updates, every), updates]
    assert len(evaluated) <= 20
    assert evaluated[0] <= 0.8 * updates or updates == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"updates": 0}, "updates 0 must be at least 1"),
        ({"batch": -1}, "batch -1 must be at least 1"),
        ({"ema": 1.0}, r"ema 1.0 must lie in \[0, 1\)"),
        ({"ema": -0.1}, r"ema -0.1 must lie in \[0, 1\)"),
    ],
)
def test_what_makes_no_run_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        settings(**changes)
