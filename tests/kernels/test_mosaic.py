"""The Mosaic kernels against float64 loops: in the interpreter (`-m slow`), and the same on a GPU (`-m gpu`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import frame_attention, ring_attention
from tests.kernels import interpreter


@pytest.fixture(scope="module", params=[pytest.param("interpreter", marks=pytest.mark.slow), pytest.param("gpu", marks=pytest.mark.gpu)])
def raced(request):
    """Makes the kernels run; the result says whether their threads raced for memory, which a GPU does not tell."""
    if request.param == "gpu":
        if jax.default_backend() != "gpu":
            pytest.skip("no GPU")
        yield lambda: False
        return
    if not interpreter.AVAILABLE:
        pytest.skip(f"jax {jax.__version__} cannot interpret these kernels; 0.11 can")
    with interpreter.interpreted_kernels() as raced:
        yield raced


def normal(rng, *shape, scale=1.0):
    """bfloat16, and the same values in float64."""
    x = jnp.asarray(scale * rng.normal(size=shape), jnp.bfloat16)
    return x, np.asarray(x, np.float64)


def attend(q, keys, values):
    """Queries [t, h, d] over keys and values [s, g, d] in float64."""
    out = np.empty_like(q)
    ratio = q.shape[1] // keys.shape[1]
    for head in range(q.shape[1]):
        logits = q[:, head] @ keys[:, head // ratio].T / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[:, head] = weights @ values[:, head // ratio] / weights.sum(axis=1, keepdims=True)
    return out


# Tokens of the chunk, heads, key heads, head dim, fixed slots, ring slots: no two tails alike, and none a multiple of a tile.
RINGS = {
    "grouped": (70, 2, 1, 64, 30, 270),
    "wide": (129, 1, 1, 128, 0, 150),
    "empty": (20, 2, 1, 64, 0, 0),
}


@pytest.mark.parametrize("name", RINGS)
def test_ring(raced, name):
    t, h, g, d, fixed_slots, ring_slots = RINGS[name]
    slots, b = fixed_slots + ring_slots, 2
    rng = np.random.default_rng(0)
    # Sharp weights: each key is the only one that counts to some query, so a lost one shows.
    (q, q64), (k, k64), (v, v64) = normal(rng, b, t, h, d, scale=4.0), normal(rng, b, t, g, d), normal(rng, b, t, g, d)
    (cache_k, cache_k64), (cache_v, cache_v64) = normal(rng, 2, b, slots, g, d), normal(rng, 2, b, slots, g, d)

    def lengths(most):
        return st.lists(st.integers(0, most), min_size=b, max_size=b)

    @settings(max_examples=4, deadline=None)
    @example([0] * b, [0] * b)
    @example([fixed_slots, 0], [0, ring_slots])
    @example([fixed_slots + 1] * b, [ring_slots + 1] * b)  # more than there are means all
    @example([0, fixed_slots], [min(128, ring_slots), min(129, ring_slots)])
    @given(lengths(fixed_slots), lengths(ring_slots))
    def check(fixed_valid, ring_valid):
        seen = np.zeros((b, slots), bool)
        for row in range(b):
            seen[row, : min(fixed_valid[row], fixed_slots)] = True
            seen[row, fixed_slots : fixed_slots + ring_valid[row]] = True
        # What must not be seen would show: large keys and values.
        hidden = jnp.asarray(~seen)[None, :, :, None, None]
        out = ring_attention(
            q,
            k,
            v,
            jnp.where(hidden, 100, cache_k),
            jnp.where(hidden, 1000, cache_v),
            layer=1,
            fixed_slots=fixed_slots,
            fixed_valid=jnp.array(fixed_valid, jnp.int32),
            ring_valid=jnp.array(ring_valid, jnp.int32),
            impl="mosaic",
        )
        jax.block_until_ready(out)
        assert out.dtype == jnp.bfloat16 and not raced()
        for row in range(b):
            keys = np.concatenate([cache_k64[1, row, seen[row]], k64[row]])
            values = np.concatenate([cache_v64[1, row, seen[row]], v64[row]])
            np.testing.assert_allclose(np.asarray(out[row], np.float64), attend(q64[row], keys, values), atol=0.04)

    check()


# Queries, heads, key heads, head dim, keys: shared memory holds up to 128 at once (gradients: 64), more are streamed.
FRAMES = {
    "one": (5, 1, 1, 64, 1),
    "audio": (70, 4, 2, 64, 24),
    "wide": (130, 2, 2, 128, 64),
    "two tiles": (40, 2, 1, 128, 100),
    "streamed": (70, 2, 2, 64, 150),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frame(raced, name):
    t, h, g, d, a = FRAMES[name]
    b, f = 1, 3
    rng = np.random.default_rng(0)
    (q, q64), (k, k64), (v, v64) = normal(rng, b, f, t, h, d, scale=4.0), normal(rng, b, f, a, g, d), normal(rng, b, f, a, g, d)
    d_out, _ = normal(rng, b, f, t, h, d)

    @settings(max_examples=3, deadline=None)
    @example([0, 1, a])
    @given(st.lists(st.integers(0, a), min_size=f, max_size=f))
    def check(valid):
        valid = np.array([valid], np.int32)
        seen = np.where(valid == 0, a, valid)
        hidden = jnp.asarray(np.arange(a) >= seen[..., None])[..., None, None]

        def attention(q, k, v, impl):
            return frame_attention(q, k, v, valid=jnp.asarray(valid), impl=impl)

        arrays = q, jnp.where(hidden, 100, k), jnp.where(hidden, 1000, v)
        out, gradients = jax.vjp(lambda *x: attention(*x, "mosaic"), *arrays)
        jax.block_until_ready(out)  # the interpreter calls back into JAX, and two programs at once can wait for each other
        gradients = jax.block_until_ready(gradients(d_out))
        assert not raced()
        for frame in range(f):
            count = seen[0, frame]
            queries = q64[0, frame] * (valid[0, frame] > 0)
            expected = attend(queries, k64[0, frame, :count], v64[0, frame, :count])
            np.testing.assert_allclose(np.asarray(out[0, frame], np.float64), expected, atol=0.04)
        # What is hidden is left out here: in float32 a large value times a weight of 0 is 0 too, but plain numbers are easier to compare.
        plain = [x.astype(jnp.float32) for x in (q, k, v)]
        references = jax.vjp(lambda *x: attention(*x, "xla"), *plain)[1](d_out.astype(jnp.float32))
        for ours, reference in zip(gradients, references, strict=True):
            assert ours.dtype == jnp.bfloat16
            np.testing.assert_allclose(ours.astype(jnp.float32), reference, atol=0.02 * float(jnp.abs(reference).max()) + 1e-5)

    check()
    out = frame_attention(q, k, v, impl="mosaic")
    for frame in range(f):
        np.testing.assert_allclose(np.asarray(out[0, frame], np.float64), attend(q64[0, frame], k64[0, frame], v64[0, frame]), atol=0.04)
