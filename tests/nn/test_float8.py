"""Products in e4m3: the number format by hand, the error against float64, and what must not happen to zeros and outliers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pikastream_jax.nn.float8 import E4M3_MAX, Float8Linear, quantise
from pikastream_jax.nn.layers import linear_of


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-20, 20))
def test_a_row_is_its_values_times_its_scale(seed, exponent):
    """Three bits of mantissa: each element is off by at most 1/16 of itself, or by half a step of the smallest numbers."""
    x = (np.random.default_rng(seed).normal(size=(4, 33)) * 2.0**exponent).astype(np.float32)
    values, scale = quantise(jnp.asarray(x))
    assert values.dtype == jnp.float8_e4m3fn and scale.shape == (4, 1)
    back = np.asarray(values).astype(np.float64) * np.asarray(scale, np.float64)
    assert np.isfinite(back).all()
    smallest = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).smallest_subnormal)
    assert (np.abs(back - x) <= np.maximum(np.abs(x) / 16 * 1.001, np.asarray(scale) * smallest / 2 * 1.001)).all()
    np.testing.assert_allclose(np.abs(np.asarray(values).astype(np.float32)).max(axis=1), E4M3_MAX)


def test_zeros_stay_zeros():
    values, scale = quantise(jnp.zeros((2, 8)))
    assert (np.asarray(values).astype(np.float32) == 0).all() and np.isfinite(scale).all()


def linear(seed, size=(64, 48), dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return linear_of(jnp.asarray(rng.normal(size=size) / 8, dtype), jnp.asarray(rng.normal(size=size[1]), dtype))


def test_the_product_is_that_of_the_rounded_factors():
    """Against float64 on the same e4m3 values: only the order of the sum differs; and near to the exact product."""
    exact, x = linear(0), np.random.default_rng(1).normal(size=(3, 5, 64)).astype(np.float32)
    rounded = Float8Linear(exact)
    assert rounded.kernel[...].shape == (48, 64) and rounded.kernel[...].dtype == jnp.float8_e4m3fn
    out = np.asarray(jax.jit(lambda module, x: module(x))(rounded, jnp.asarray(x)))
    values, scale = (np.asarray(part).astype(np.float64) for part in quantise(jnp.asarray(x)))
    weights = np.asarray(rounded.kernel[...]).astype(np.float64) * np.asarray(rounded.scale[...])[:, None]
    np.testing.assert_allclose(out, (values * scale) @ weights.T + np.asarray(exact.bias[...]), rtol=1e-5, atol=1e-5)
    wanted = x.astype(np.float64) @ np.asarray(exact.kernel[...], np.float64) + np.asarray(exact.bias[...])
    error = np.linalg.norm(out - wanted) / np.linalg.norm(wanted - np.asarray(exact.bias[...]))
    assert 0.01 < error < 0.05  # two factors rounded to 3 bits, errors of random sign


def test_one_outlier_spoils_its_own_token_only():
    exact = linear(2)
    x = np.random.default_rng(3).normal(size=(2, 64)).astype(np.float32)
    loud = x.copy()
    loud[0, 0] = 1e4
    module = Float8Linear(exact)
    np.testing.assert_array_equal(module(jnp.asarray(x))[1], module(jnp.asarray(loud))[1])


def test_dtype_follows_the_tokens():
    module = Float8Linear(linear(4, dtype=jnp.bfloat16))
    assert module(jnp.ones((2, 64), jnp.bfloat16)).dtype == jnp.bfloat16
    assert isinstance(module.scale, nnx.Param) and module.scale[...].dtype == jnp.float32
