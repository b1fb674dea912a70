"""The attention front doors against float64 loops written from their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import chunked_attention, frame_attention, ring_attention


def attend(q, keys, values):
    """One query head [d] over keys [s, d] in float64."""
    logits = keys.astype(np.float64) @ q.astype(np.float64) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max())
    return weights @ values.astype(np.float64) / weights.sum()


SHAPES = [(0, 4, 1, 1), (1, 2, 2, 1), (3, 5, 2, 2)]  # fixed slots, ring slots, groups, queries to a group
compiled_ring = jax.jit(ring_attention, static_argnames=("layer", "fixed_slots"))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_ring_attention(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    fixed, ring, groups, ratio = data.draw(st.sampled_from(SHAPES))
    t, d, b = 3, 4, 2
    h = groups * ratio
    q = rng.normal(size=(b, t, h, d)).astype(np.float32)
    k, v = rng.normal(size=(2, b, t, groups, d)).astype(np.float32)
    cache_k, cache_v = rng.normal(size=(2, 3, b, fixed + ring, groups, d)).astype(np.float32)
    fixed_valid = np.array([data.draw(st.integers(0, fixed)) for _ in range(b)])
    ring_valid = np.array([data.draw(st.integers(0, ring)) for _ in range(b)])
    out = compiled_ring(
        q, k, v, cache_k, cache_v, layer=1, fixed_slots=fixed, fixed_valid=jnp.array(fixed_valid), ring_valid=jnp.array(ring_valid)
    )
    out = np.asarray(out)
    for row in range(b):
        slots = [*range(fixed_valid[row]), *range(fixed, fixed + ring_valid[row])]
        for head in range(h):
            g = head // ratio
            keys = np.concatenate([cache_k[1, row, slots, g], k[row, :, g]])
            values = np.concatenate([cache_v[1, row, slots, g], v[row, :, g]])
            for i in range(t):
                np.testing.assert_allclose(out[row, i, head], attend(q[row, i, head], keys, values), atol=1e-5)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("with_fixed", [False, True])
def test_chunked_attention(copies, with_fixed):
    rng = np.random.default_rng(copies)
    chunk_ids = np.array([[0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 3, 3]])
    b, f, tokens, h, g, d, window = 2, 6, 2, 4, 2, 4, 2
    n = copies * f * tokens
    q, q_fixed = rng.normal(size=(2, b, n, h, d)).astype(np.float32)
    k, v = rng.normal(size=(2, b, n, g, d)).astype(np.float32)
    k_fixed, v_fixed = rng.normal(size=(2, b, 3, g, d)).astype(np.float32)
    fixed = (q_fixed, k_fixed, v_fixed) if with_fixed else None
    attention = jax.jit(chunked_attention, static_argnames=("window", "copies"))
    out = np.asarray(attention(q, k, v, chunk_ids=jnp.array(chunk_ids), window=window, copies=copies, fixed=fixed))

    def sees(row, query, key):
        q_copy, q_frame = divmod(query // tokens, f)
        k_copy, k_frame = divmod(key // tokens, f)
        chunk = chunk_ids[row, q_frame]
        first = list(chunk_ids[row]).index(chunk)
        if chunk_ids[row, k_frame] == chunk:
            return q_copy == k_copy
        return k_copy == 0 and first - window <= k_frame < first

    for row in range(b):
        for i in range(n):
            seen = [j for j in range(n) if sees(row, i, j)]
            for head in range(h):
                group = head // 2
                logits = k[row, seen, group].astype(np.float64) @ q[row, i, head] / 2.0
                values = v[row, seen, group]
                if with_fixed:
                    logits = np.concatenate([logits, k_fixed[row, :, group].astype(np.float64) @ q_fixed[row, i, head] / 2.0])
                    values = np.concatenate([values, v_fixed[row, :, group]])
                weights = np.exp(logits - logits.max())
                np.testing.assert_allclose(out[row, i, head], weights @ values / weights.sum(), atol=1e-5)


def test_frame_attention():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, 4, 2, 6)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 3, 5, 2, 6)).astype(np.float32)
    valid = np.array([[1, 5, 3], [2, 4, 5]])
    attention = jax.jit(frame_attention)
    out, everything = np.asarray(attention(q, k, v, valid=jnp.array(valid))), np.asarray(attention(q, k, v))
    for index in np.ndindex(2, 3, 4, 2):
        row, frame, token, head = index
        count = valid[row, frame]
        np.testing.assert_allclose(out[index], attend(q[index], k[row, frame, :count, head], v[row, frame, :count, head]), atol=1e-5)
        np.testing.assert_allclose(everything[index], attend(q[index], k[row, frame, :, head], v[row, frame, :, head]), atol=1e-5)


def test_unknown_implementation_is_named():
    x = jnp.zeros((1, 1, 1, 1, 2))
    with pytest.raises(ValueError, match="impl 'fast' is not one of auto, xla"):
        frame_attention(x, x, x, impl="fast")
