"""Layers and the Transformer block against float64 NumPy, and the functional view of a module."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import frame_attention
from pikastream_jax.nn.attention import Block
from pikastream_jax.nn.layers import MLP, RMSNorm, functional, initial_params, modulated_layer_norm, parameter_count
from tests.small import randomised

DIM, HEADS, KV_HEADS = 24, 4, 2


def rms_norm64(x, scale, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def linear64(x, p):
    return x @ p["kernel"] + p["bias"]


def mlp64(x, p):
    hidden = linear64(x, p["up"])
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return linear64(hidden, p["down"])


def block64(x, p):
    """One sequence [n, d] through the block, every token seeing every other."""
    e = DIM // HEADS
    attention = p["attention"]
    qkv = linear64(rms_norm64(x, p["norm_attention"]["scale"]), attention["qkv"])
    q, k, v = np.split(qkv.reshape(len(x), -1, e), [HEADS, HEADS + KV_HEADS], axis=1)
    q, k = rms_norm64(q, attention["norm_q"]["scale"]), rms_norm64(k, attention["norm_k"]["scale"])
    out = np.zeros((len(x), HEADS, e))
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        logits = q[:, head] @ k[:, group].T / np.sqrt(e)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
    x = x + linear64(out.reshape(len(x), DIM), attention["out"])
    return x + mlp64(rms_norm64(x, p["norm_mlp"]["scale"]), p["mlp"])


def build_block(rngs):
    return Block(DIM, HEADS, KV_HEADS, 2.0, rngs=rngs)


@pytest.fixture(scope="module")
def block():
    model = functional(build_block)
    return model, randomised(model.abstract, 0)


def double(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def test_block_against_float64(block):
    model, params = block
    x = np.random.default_rng(0).normal(size=(2, 3, 5, DIM)).astype(np.float32)
    out = jax.jit(lambda p, x: model.bind(p)(x, frame_attention))(params, x)
    assert np.std(np.asarray(out) - x) > 0.1
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(out[index], block64(x[index].astype(np.float64), double(params)), atol=2e-5)


def test_mlp_against_float64():
    model = functional(lambda rngs: MLP(6, 10, 4, rngs=rngs))
    params = randomised(model.abstract, 1)
    x = np.random.default_rng(1).normal(size=(7, 6)).astype(np.float32)
    np.testing.assert_allclose(model.bind(params)(x), mlp64(x.astype(np.float64), double(params)), atol=1e-5)


def test_norms_against_float64():
    x = (np.random.default_rng(2).normal(size=(5, 8)) * 3 + 1).astype(np.float32)
    scale = np.linspace(0.5, 2.0, 8)
    norm = RMSNorm(8)
    norm.scale = nnx.Param(jnp.asarray(scale, jnp.float32))
    np.testing.assert_allclose(norm(jnp.asarray(x)), rms_norm64(x.astype(np.float64), scale), atol=1e-5)
    centred = x.astype(np.float64) - x.mean(-1, keepdims=True, dtype=np.float64)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    shift, gain = np.random.default_rng(3).normal(size=(2, 5, 1))
    modulated = modulated_layer_norm(jnp.asarray(x), jnp.asarray(shift, jnp.float32), jnp.asarray(gain, jnp.float32))
    np.testing.assert_allclose(modulated, expected * (1 + gain) + shift, atol=1e-5)


def modulated(x):
    return modulated_layer_norm(x, jnp.float32(0.3), jnp.float32(-0.4))


@pytest.mark.parametrize("norm", [RMSNorm(8), modulated], ids=["rms", "layer"])
def test_norms_work_in_float32_and_return_the_dtype_they_were_given(norm):
    """In bfloat16 the square of 300 keeps two digits; the result must be as good as a single rounding at the end."""
    x = jnp.asarray(300 + np.arange(8.0) * 4, jnp.bfloat16)
    out = norm(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), norm(x.astype(jnp.float32)), rtol=2**-8)


def test_the_functional_view_counts_without_allocating(block):
    model, params = block
    e = DIM // HEADS
    by_hand = DIM * (HEADS + 2 * KV_HEADS) * e + (HEADS + 2 * KV_HEADS) * e  # qkv
    by_hand += DIM * DIM + DIM + 2 * e  # out, norms of q and k
    by_hand += DIM * 2 * DIM + 2 * DIM + 2 * DIM * DIM + DIM + 2 * DIM  # MLP, the two norms
    assert parameter_count(model.abstract) == parameter_count(params) == by_hand
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model.abstract))


def test_initial_params_fit_the_abstract_ones_and_follow_the_key(block):
    model, _ = block
    draw = functools.partial(initial_params, build_block)
    first, again, other = draw(jax.random.key(0)), draw(jax.random.key(0)), draw(jax.random.key(1))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.abstract)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), first) == shapes
    np.testing.assert_array_equal(first["mlp"]["up"]["kernel"], again["mlp"]["up"]["kernel"])
    assert (first["mlp"]["up"]["kernel"] != other["mlp"]["up"]["kernel"]).any()
