"""Paired statistics against numbers worked out by hand."""

import numpy as np
import pytest

from pikastream_jax.measuring.paired import Paired, compared, mean_and_error, table


def test_by_hand():
    """Differences 1, 3, 2: mean 2, standard deviation 1, standard error 1 / sqrt 3."""
    found = compared(np.array([1.0, 2.0, 3.0]), np.array([2.0, 5.0, 5.0]))
    assert (found.first, found.second, found.difference, found.pairs) == (2.0, 4.0, 2.0, 3)
    assert found.standard_error == pytest.approx(3**-0.5)
    assert found.standard_errors == pytest.approx(2 * 3**0.5)


def test_what_clips_have_in_common_falls_out():
    rng = np.random.default_rng(0)
    hard = 10.0 * rng.normal(size=100)
    found = compared(hard, hard + 0.1 + 0.1 * rng.normal(size=100))
    assert found.standard_error == pytest.approx(0.01, rel=0.3) and found.verdict(1) == "better"


def test_pairs_with_a_gap_are_left_out():
    found = compared(np.array([0.0, np.nan, 1.0, 5.0]), np.array([1.0, 3.0, 2.0, np.nan]))
    assert (found.pairs, found.difference, found.standard_error) == (2, 1.0, 0.0)
    assert found.standard_errors == np.inf and found.verdict(-1) == "worse"


@pytest.mark.parametrize(
    ("difference", "better", "said"),
    [(1.9, 1, "same"), (2.0, 1, "better"), (2.0, -1, "worse"), (-2.0, 1, "worse"), (-2.0, -1, "better"), (3.0, 0, "more"), (-3.0, 0, "less")],
)
def test_verdicts(difference, better, said):
    assert Paired(0.0, difference, difference, 1.0, 9).verdict(better) == said


def test_nothing_differs():
    assert compared(np.ones(3), np.ones(3)).verdict(1) == "same"


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="1 of 2 pairs"):
        compared(np.array([1.0, np.nan]), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="3 and 2 clips make no pairs"):
        compared(np.ones(3), np.ones(2))


def test_a_table_has_a_line_for_each_common_measure():
    text = table(("sft", "reward"), {"r": np.array([0.1, 0.2, 0.4]), "only": np.ones(3)}, {"r": np.array([0.3, 0.4, 0.7])}, {"r": 1})
    assert len(text.splitlines()) == 2 and text.endswith("better") and "+0.2333" in text
    assert "fewer than 2" in table(("a", "b"), {"f1": np.array([np.nan, 1.0])}, {"f1": np.ones(2)}, {})


def test_mean_and_error():
    assert mean_and_error([1.0, 3.0, np.inf]) == (2.0, 1.0)
    assert np.isnan(mean_and_error([np.nan])).all()
