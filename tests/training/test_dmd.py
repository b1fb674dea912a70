"""Distribution matching: its gradient and loss by hand, and on Gaussians, whose scores are known, it finds the target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.diffusion.flow import interpolate
from pikastream_jax.training.dmd import matching_gradient, matching_loss, score_timesteps

RNG = np.random.default_rng(0)
GENERATED, FAKE, REAL = (RNG.normal(size=(3, 2, 2, 2, 3)) for _ in range(3))
COUNTS = np.array([[True, True], [False, True], [True, True]])


def test_gradient_and_loss_by_hand():
    """In float64, row by row; in row 1 the first latent frame does not count, row 2 is exactly what the teacher wants."""
    real = REAL.copy()
    real[2] = GENERATED[2]
    fake = FAKE.copy()
    fake[2] = real[2]
    expected = np.zeros_like(GENERATED)
    for row in range(2):
        scale = np.abs(GENERATED[row, COUNTS[row]] - real[row, COUNTS[row]]).mean()
        expected[row] = (fake[row] - real[row]) / scale
    given = [jnp.asarray(x, jnp.float32) for x in (GENERATED, fake, real)]
    gradient = matching_gradient(*given, jnp.asarray(COUNTS))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6, err_msg="0 / 0 is no gradient")
    counted = np.broadcast_to(COUNTS[:, :, None, None, None], expected.shape)
    loss, slope = jax.value_and_grad(matching_loss)(given[0], gradient, jnp.asarray(COUNTS))
    assert loss == pytest.approx(0.5 * np.mean(expected[counted] ** 2), rel=1e-4)
    np.testing.assert_allclose(slope, np.where(counted, expected, 0) / counted.sum(), rtol=1e-3, atol=1e-7)


def test_a_network_that_fell_ill_is_not_taken_for_no_gradient():
    """0 is for rows without a frame that counts; what is not finite stops the run, and must reach the loss that the loop looks at."""
    counts = jnp.asarray([[True, True], [True, True], [False, False]])
    real = REAL.copy()
    real[1, 0, 0, 0, 0] = np.nan
    given = [jnp.asarray(x, jnp.float32) for x in (GENERATED, FAKE, real)]
    gradient = matching_gradient(*given, counts)
    assert np.isfinite(gradient[0]).all() and np.isnan(gradient[1]).any() and (gradient[2] == 0).all()
    assert np.isnan(matching_loss(given[0], gradient, counts))


def test_timesteps_are_shifted_and_clamped():
    t = np.asarray(score_timesteps(jax.random.key(0), 20_000, 3.0))
    assert t.min() == pytest.approx(0.02) and t.max() == pytest.approx(0.98)
    assert np.median(t) == pytest.approx(0.75, abs=0.01), "3 x 0.5 / (1 + 2 x 0.5)"
    # t >= 0.98 where u >= 0.98 / (3 - 2 x 0.98)
    assert (t > 0.97999).mean() == pytest.approx(1 - 0.98 / 1.04, abs=0.005)


def test_a_gaussian_generator_finds_the_target():
    """x = mean + std z against N(-0.5, 0.4^2): the posterior mean of a Gaussian at x_t is known, so are both scores."""

    def expected_clean(mean, std, x, t):
        t = t[:, None, None, None, None]
        gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
        return mean + gain * (x - (1 - t) * mean)

    def generated(weights, key):
        return weights["mean"] + weights["std"] * jax.random.normal(key, (64, 1, 2, 2, 4))

    def update(weights, key):
        k_z, k_t, k_noise = jax.random.split(key, 3)

        def loss(weights):
            x = generated(weights, k_z)
            seen, t = jax.lax.stop_gradient(x), score_timesteps(k_t, 64, 1.0)
            noisy = interpolate(seen, jax.random.normal(k_noise, seen.shape), t[:, None])
            fake = expected_clean(*jax.lax.stop_gradient((weights["mean"], weights["std"])), noisy, t)
            real = expected_clean(-0.5, 0.4, noisy, t)
            counts = jnp.ones((64, 1), bool)
            return matching_loss(x, matching_gradient(seen, fake, real, counts), counts)

        return jax.tree.map(lambda w, g: w - 0.05 * g, weights, jax.grad(loss)(weights)), None

    start = {"mean": jnp.float32(1.0), "std": jnp.float32(1.2)}
    end, _ = jax.lax.scan(update, start, jax.random.split(jax.random.key(0), 400))
    assert end["mean"] == pytest.approx(-0.5, abs=0.03)
    assert end["std"] == pytest.approx(0.4, abs=0.03)
