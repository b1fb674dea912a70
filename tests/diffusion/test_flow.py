"""Flow matching: values worked out by hand, and identities of the straight path."""

import jax
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pikastream_jax.diffusion.flow import (
    interpolate,
    logit_normal_timesteps,
    shift_timestep,
    solver_timesteps,
)

values = hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(-4, 4, width=32))
times = hnp.arrays(np.float32, (2, 3), elements=st.floats(0, 1, width=32))


def test_the_path_by_hand():
    clean, noise = np.array([[[2.0], [2.0], [2.0]]]), np.array([[[10.0], [10.0], [10.0]]])
    x = interpolate(clean, noise, np.array([[0.0, 0.25, 1.0]]))
    assert x[..., 0].tolist() == [[2.0, 4.0, 10.0]]


@settings(max_examples=40, deadline=None)
@given(values, values, times)
def test_the_true_velocity_leads_back_to_the_clean_latents(clean, noise, t):
    x = interpolate(clean, noise, t)
    np.testing.assert_allclose(x - t[..., None] * (noise - clean), clean, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(values, values, st.integers(1, 8), st.floats(0.5, 6))
def test_the_solver_walks_the_true_velocity_from_noise_to_clean(clean, noise, steps, shift):
    x, timesteps = noise, solver_timesteps(steps, shift)
    for t, t_next in zip(timesteps[:-1], timesteps[1:], strict=True):
        np.testing.assert_allclose(x, interpolate(clean, noise, np.full((2, 3), t)), atol=1e-4)
        x = x + (t_next - t) * (noise - clean)
    np.testing.assert_allclose(x, clean, atol=1e-4)


def test_solver_timesteps_by_hand():
    # The well-known four steps at shift 5, in thousandths.
    np.testing.assert_allclose(1000 * solver_timesteps(4, 5.0), [1000, 937.5, 833.333, 625, 0], atol=0.01)
    np.testing.assert_allclose(solver_timesteps(4, 2.0), [1, 6 / 7, 2 / 3, 2 / 5, 0], atol=1e-6)
    np.testing.assert_allclose(solver_timesteps(2, 1.0), [1, 0.5, 0])
    assert solver_timesteps(4, 5.0).dtype == np.float32


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.floats(0.25, 8))
def test_shift_keeps_the_ends_and_is_undone_by_its_inverse(t, shift):
    assert shift_timestep(0.0, shift) == 0 and shift_timestep(1.0, shift) == pytest.approx(1)
    assert shift_timestep(shift_timestep(t, shift), 1 / shift) == pytest.approx(t, abs=1e-9)
    # It multiplies the odds of noise: t / (1 - t).
    if t < 0.999:
        assert shift_timestep(t, shift) / (1 - shift_timestep(t, shift)) == pytest.approx(shift * t / (1 - t))


def test_training_timesteps_are_logit_normal_before_the_shift():
    t = np.asarray(logit_normal_timesteps(jax.random.key(0), (20_000,), 3.0), np.float64)
    assert t.min() > 0 and t.max() < 1
    # log odds of the shifted times: normal around log 3 with unit variance
    odds = scipy.special.logit(t)
    assert odds.mean() == pytest.approx(np.log(3.0), abs=0.03)
    assert odds.std() == pytest.approx(1.0, abs=0.03)
