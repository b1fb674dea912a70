import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.training.accumulate import mean_gradient
from pikastream_jax.training.mesh import make_mesh


def losses(params, batch, key, scale):
    """A mean over rows that looks at its key in the metrics alone."""
    error = jnp.tanh(batch["x"] @ params["w"]) - batch["y"]
    loss = scale * jnp.mean(error**2)
    return loss, {"loss": loss, "noise": jax.random.uniform(key)}


def problem(rows=12):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)}
    batch = {name: jnp.asarray(rng.normal(size=(rows, n)), jnp.float32) for name, n in (("x", 5), ("y", 3))}
    return params, batch


@pytest.mark.parametrize("slices", [2, 3, 12])
def test_slices_give_the_gradient_of_the_whole_batch(slices):
    params, batch = problem()
    whole, metrics = jax.jit(mean_gradient(losses, 1))(params, batch, jax.random.key(0), 2.0)
    sliced, sliced_metrics = jax.jit(mean_gradient(losses, slices))(params, batch, jax.random.key(0), 2.0)
    np.testing.assert_allclose(sliced["w"], whole["w"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sliced_metrics["loss"], metrics["loss"], rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), slices)
    np.testing.assert_allclose(sliced_metrics["noise"], np.mean([jax.random.uniform(key) for key in keys]), rtol=1e-6)


def test_the_gradient_against_float64_by_hand():
    params, batch = problem()
    sliced, _ = mean_gradient(losses, 4)(params, batch, jax.random.key(0), 1.0)
    x, y, w = (np.asarray(a, np.float64) for a in (batch["x"], batch["y"], params["w"]))
    predicted = np.tanh(x @ w)
    np.testing.assert_allclose(sliced["w"], x.T @ (2 * (predicted - y) * (1 - predicted**2)) / y.size, rtol=1e-5, atol=1e-7)


def test_what_does_not_divide_is_refused():
    params, batch = problem()
    with pytest.raises(ValueError, match="a batch of 12 does not divide into 5 slices"):
        mean_gradient(losses, 5)(params, batch, jax.random.key(0), 1.0)
    with jax.sharding.use_abstract_mesh(make_mesh(fsdp=2, devices=4)):
        jax.eval_shape(mean_gradient(losses, 3), params, batch, jax.random.key(0), 1.0)
        with pytest.raises(ValueError, match="12 does not divide into 6 slices, each split over 4 devices: change batch or accumulate"):
            jax.eval_shape(mean_gradient(losses, 6), params, batch, jax.random.key(0), 1.0)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        mean_gradient(losses, 0)
