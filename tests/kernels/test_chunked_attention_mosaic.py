"""The Mosaic kernels of the training attention: numbers and gradients in the GPU interpreter (jax >= 0.11), lowering at real sizes anywhere."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import chunked_attention
from tests.kernels import interpreter

TOLERANCE = 2e-2  # of the largest value: inputs, softmax weights and results are rounded to bfloat16 (1 in 256)


def definition(q, k, v, fixed, chunk_ids, window, copies):
    """Outputs [b, n, h, d] in float64, a loop over rows and heads with a mask written from the words of `frame_visibility`."""
    b, n, h, d = q.shape
    frames = chunk_ids.shape[1]
    tokens = n // (copies * frames)
    frame, copy = np.arange(n) // tokens % frames, np.arange(n) // tokens // frames
    out = np.zeros(q.shape)
    for row, head in np.ndindex(b, h):
        chunk = chunk_ids[row][frame]
        first = np.searchsorted(chunk_ids[row], chunk)
        own = (chunk[:, None] == chunk[None, :]) & (copy[:, None] == copy[None, :])
        past = (copy == 0)[None, :] & (frame[None, :] < first[:, None]) & (frame[None, :] >= first[:, None] - window)
        group = head // (h // k.shape[2])
        logits = np.where(own | past, q[row, :, head] @ k[row, :, group].T / math.sqrt(d), -np.inf)
        values = v[row, :, group]
        if fixed:
            logits = np.concatenate([logits, fixed[0][row, :, head] @ fixed[1][row, :, group].T / math.sqrt(d)], axis=1)
            values = np.concatenate([values, fixed[2][row, :, group]])
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[row, :, head] = weights / weights.sum(axis=1, keepdims=True) @ values
    return out


def random_inputs(seed, *, b, copies, frames, tokens, heads, groups, d, fixed_tokens):
    rng = np.random.default_rng(seed)
    n = copies * frames * tokens
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    q, k, v = draw(b, n, heads, d), draw(b, n, groups, d), draw(b, n, groups, d)
    fixed = (draw(b, n, heads, d), draw(b, fixed_tokens, groups, d), draw(b, fixed_tokens, groups, d)) if fixed_tokens else None
    chunk_ids = np.cumsum(rng.random((b, frames)) < 0.6, axis=1).astype(np.int32)
    return q, k, v, fixed, chunk_ids


def assert_close(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


# Tiles that straddle frames and copies, or hold many frames; counts that are no multiple of 8; more than one tile of fixed keys; more steps than
# stages; a warpgroup with nothing to do; two query heads to a key head.
SIZES = [
    dict(b=2, copies=2, frames=3, tokens=24, heads=2, groups=1, d=64, fixed_tokens=0),
    dict(b=1, copies=2, frames=4, tokens=39, heads=1, groups=1, d=64, fixed_tokens=39),
    dict(b=1, copies=1, frames=5, tokens=70, heads=1, groups=1, d=128, fixed_tokens=130),
    dict(b=2, copies=1, frames=2, tokens=13, heads=2, groups=1, d=128, fixed_tokens=5),
]


def check_output(seed, sizes, window):
    q, k, v, fixed, chunk_ids = random_inputs(seed, **sizes)
    with interpreter.interpreted_kernels() as raced:
        out = chunked_attention(q, k, v, chunk_ids=chunk_ids, window=window, copies=sizes["copies"], fixed=fixed, impl="mosaic")
        out = np.asarray(out, np.float64)
        assert not raced()
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (q, k, v, fixed))
    assert_close(out, definition(*wide, chunk_ids, window, sizes["copies"]))


def check_gradients(seed, sizes, window):
    q, k, v, fixed, chunk_ids = random_inputs(seed, **sizes)
    weights = jnp.asarray(np.random.default_rng(seed + 1).normal(size=q.shape), jnp.float32)

    def loss(arguments, impl):
        q, k, v, fixed = arguments
        out = chunked_attention(q, k, v, chunk_ids=chunk_ids, window=window, copies=sizes["copies"], fixed=fixed, impl=impl)
        return (out.astype(jnp.float32) * weights).sum()

    with interpreter.interpreted_kernels() as raced:
        gradients = jax.block_until_ready(jax.grad(loss)((q, k, v, fixed), "mosaic"))
        assert not raced()
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (q, k, v, fixed))
    jax.tree.map(assert_close, gradients, jax.grad(loss)(wide, "xla"))


cases = given(st.integers(0, 1000), st.sampled_from(SIZES), st.sampled_from([0, 1, 2, 9]))


@interpreter.needed
@settings(max_examples=3, deadline=None)
@cases
def test_output_is_the_definitions(seed, sizes, window):
    check_output(seed, sizes, window)


@interpreter.needed
def test_gradients_are_the_references():
    check_gradients(0, SIZES[3], 1)


@pytest.mark.slow  # every gradient takes 10 to 30 s in the interpreter
@interpreter.needed
@settings(max_examples=12, deadline=None)
@cases
def test_output_and_gradients_of_many_cases(seed, sizes, window):
    check_output(seed, sizes, window)
    check_gradients(seed, sizes, window)


def lowered(*, b, copies, frames, tokens, heads, groups, d, with_fixed, gradient):
    n = copies * frames * tokens
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)  # noqa: E731
    fixed = (shape(b, n, heads, d), shape(b, tokens, groups, d), shape(b, tokens, groups, d)) if with_fixed else None

    def loss(arguments, chunk_ids):
        q, k, v, fixed = arguments
        out = chunked_attention(q, k, v, chunk_ids=chunk_ids, window=12, copies=copies, fixed=fixed, impl="mosaic")
        return out.astype(jnp.float32).sum()

    function = jax.jit(jax.grad(loss) if gradient else loss)
    arguments = (shape(b, n, heads, d), shape(b, n, groups, d), shape(b, n, groups, d), fixed)
    traced = function.trace(arguments, jax.ShapeDtypeStruct((b, frames), jnp.int32))
    return traced.lower(lowering_platforms=("cuda",)).as_text(), n


NINE_B = dict(b=1, copies=2, tokens=390, heads=32, groups=32, d=128, with_fixed=True)
REAL_SIZES = [
    dict(NINE_B, frames=12),
    dict(NINE_B, frames=13),  # 10,140 tokens: no multiple of 8
    dict(NINE_B, frames=21),
    dict(b=1, copies=2, frames=21, tokens=1560, heads=12, groups=12, d=128, with_fixed=True),
    dict(b=8, copies=2, frames=12, tokens=64, heads=4, groups=4, d=64, with_fixed=True),
    dict(b=8, copies=1, frames=12, tokens=256, heads=16, groups=4, d=64, with_fixed=False),
]


@pytest.mark.parametrize("sizes", REAL_SIZES, ids=lambda sizes: "x".join(str(int(x)) for x in sizes.values()))
def test_lowers_for_cuda_without_anything_of_tokens_by_tokens(sizes):
    forward, n = lowered(**sizes, gradient=False)
    backward, _ = lowered(**sizes, gradient=True)
    parts = 2 if sizes["with_fixed"] else 1
    assert forward.count("@mosaic_gpu_v2") == 1
    assert backward.count("@mosaic_gpu_v2") == 1 + 2 * parts  # forward, then two for either part
    largest_input = sizes["b"] * sizes["heads"] * sizes["d"] * (n + 8)
    for dimensions in re.findall(r"tensor<((?:\d+x)+)[a-z]", forward + backward):
        numbers = [int(x) for x in dimensions.split("x")[:-1]]
        assert math.prod(numbers) <= largest_input
        assert sum(x >= n for x in numbers) <= 1


def test_unsupported_arrays_are_named():
    x = jnp.zeros((1, 4, 2, 64), jnp.bfloat16)
    attend = functools.partial(chunked_attention, chunk_ids=jnp.zeros((1, 2), jnp.int32), window=1)
    with pytest.raises(ValueError, match="takes bfloat16 arrays, not float32; cast"):
        attend(x, x.astype(jnp.float32), x, impl="mosaic")
    with pytest.raises(ValueError, match="head dim 64 or 128, not 32; choose impl 'xla'"):
        attend(*[x[..., :32]] * 3, impl="mosaic")
    with pytest.raises(ValueError, match="2 query heads are not a multiple of 3 key heads"):
        three = jnp.zeros((1, 4, 3, 64), jnp.bfloat16)
        attend(x, three, three, impl="mosaic")
    with pytest.raises(ValueError, match="cuDNN has no form of this visibility"):
        attend(x, x, x, impl="cudnn")
    with pytest.raises(ValueError, match="impl 'fast' is not one of auto, xla, mosaic"):
        attend(x, x, x, impl="fast")
