"""The attention front doors against float64 loops written from their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import _common, _cudnn, chunked_attention, frame_attention, ring_attention


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


def test_a_frame_with_nothing_valid_averages_its_values():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 2, 4, 2, 6)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 2, 5, 2, 6)).astype(np.float32)
    valid = jnp.array([[0, 5]])
    out = jax.jit(frame_attention)(q, k, v, valid=valid)
    np.testing.assert_allclose(out[:, 0], np.broadcast_to(v[:, 0].mean(axis=1, keepdims=True), out[:, 0].shape), atol=1e-6)
    of_q, of_k, of_v = jax.jit(jax.grad(lambda *x: frame_attention(*x, valid=valid).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert not of_q[:, 0].any() and not of_k[:, 0].any() and of_q[:, 1].any()
    np.testing.assert_allclose(of_v[:, 0], 4 / 5, atol=1e-6)


def test_parts_without_keys_are_skipped():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 6, 2, 4)).astype(np.float32)
    nothing = jnp.zeros((1, 0, 2, 4))
    attention = jax.jit(functools.partial(chunked_attention, chunk_ids=jnp.array([[0, 0, 1]]), window=1))
    np.testing.assert_array_equal(attention(q, k, v, fixed=(q, nothing, nothing)), attention(q, k, v))


RING = dict(layer=0, fixed_slots=1, fixed_valid=jnp.array([1]), ring_valid=jnp.array([1]))


def ring_arrays(heads=2, d=64, dtype=jnp.bfloat16, cache_dtype=None):
    own = jnp.zeros((1, 3, heads, d), dtype)
    cache = jnp.zeros((2, 1, 4, 2, d), cache_dtype or dtype)
    return own, own[:, :, :2], own[:, :, :2], cache, cache


@pytest.mark.parametrize(
    "arrays, arguments, message",
    [
        (ring_arrays(), dict(impl="fast"), "impl 'fast' is not one of auto, xla, cudnn, mosaic"),
        (ring_arrays(), dict(layer=2), "layer 2 is outside the cache's 2 layers"),
        (ring_arrays(), dict(fixed_slots=5), "fixed_slots 5 exceeds the cache's 4 slots"),
        (ring_arrays(dtype=jnp.float32), dict(impl="mosaic"), "'mosaic' takes bfloat16 arrays, not float32; cast them"),
        (ring_arrays(cache_dtype=jnp.float32), dict(impl="mosaic"), "'mosaic' takes bfloat16 arrays, not float32; cast them"),
        (ring_arrays(d=96), dict(impl="mosaic"), "'mosaic' takes head dim 64 or 128, not 96; choose impl 'xla'"),
        (ring_arrays(heads=3), dict(impl="mosaic"), "3 query heads are not a multiple of 2 key heads"),
        (ring_arrays(dtype=jnp.float32), dict(impl="cudnn"), "'cudnn' takes bfloat16 or float16 arrays, all of one dtype, not float32"),
        (ring_arrays(cache_dtype=jnp.float16), dict(impl="cudnn"), "all of one dtype, not float16; cast them"),
        (ring_arrays(d=12), dict(impl="cudnn"), "a multiple of 8, at most 128, not 12; choose impl 'xla'"),
    ],
)
def test_what_a_ring_cannot_take_is_named(arrays, arguments, message):
    with pytest.raises(ValueError, match=f"ring_attention: .*{message}"):
        ring_attention(*arrays, **(RING | arguments))


@pytest.mark.parametrize(
    "shape, keys, dtype, impl, message",
    [
        ((1, 1, 1, 1, 2), 1, jnp.float32, "fast", "impl 'fast' is not one of auto, xla, cudnn, mosaic"),
        ((1, 1, 1, 1, 64), 0, jnp.bfloat16, "mosaic", "0 keys to a group; a group needs at least 1"),
        ((1, 1, 1, 1, 64), 1, jnp.float32, "mosaic", "'mosaic' takes bfloat16 arrays, not float32; cast them or choose impl 'xla'"),
        ((1, 1, 1, 1, 32), 1, jnp.bfloat16, "mosaic", "'mosaic' takes head dim 64 or 128, not 32; choose impl 'xla'"),
        ((1, 1, 1, 1, 256), 1, jnp.bfloat16, "cudnn", "a multiple of 8, at most 128, not 256; choose impl 'xla'"),
    ],
)
def test_what_a_frame_cannot_take_is_named(shape, keys, dtype, impl, message):
    q = jnp.zeros(shape, dtype)
    k = jnp.zeros((*shape[:2], keys, *shape[3:]), dtype)
    with pytest.raises(ValueError, match=f"frame_attention: .*{message}"):
        frame_attention(q, k, k, impl=impl)


def test_without_cuda_auto_is_the_xla_program():
    arrays = ring_arrays()
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    programs = {impl: str(jax.make_jaxpr(lambda *x, impl=impl: ring_attention(*x, **RING, impl=impl))(*arrays)) for impl in ("auto", "xla")}
    assert programs["auto"] == programs["xla"]
    q = arrays[0][None]
    programs = {impl: str(jax.make_jaxpr(lambda q, impl=impl: frame_attention(q, q, q, impl=impl))(q)) for impl in ("auto", "xla")}
    assert programs["auto"] == programs["xla"]


def attend_part(q, k, v, valid):
    """What `_cudnn.attend` promises, in plain JAX; NaN where it may not be called: with no valid key."""
    ratio = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(jnp.float32), ratio, axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bths", q.astype(jnp.float32), k) * q.shape[-1] ** -0.5
    logits = jnp.where(jnp.arange(k.shape[1]) < valid[:, None, None, None], logits, -jnp.inf)
    out = jnp.einsum("bths,bshd->bthd", jax.nn.softmax(logits), v).astype(q.dtype)
    return out, jax.nn.logsumexp(logits, axis=-1)


@pytest.fixture(params=["stand-in", pytest.param("cuDNN", marks=pytest.mark.gpu)])
def part(request, monkeypatch):
    """The call that the merge is built on: in plain JAX, or the real one."""
    if request.param == "stand-in":
        monkeypatch.setattr(_cudnn, "attend", attend_part)
    elif not _common.cuda_present():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("fixed_slots, slots", [(3, 8), (0, 5), (3, 3), (0, 0)])
def test_two_calls_are_one_softmax(part, fixed_slots, slots):
    """The merge around cuDNN; its gradients are those of the reference."""
    rng = np.random.default_rng(0)
    b, t, h, g, d = 4, 5, 4, 2, 8
    q = jnp.asarray(rng.normal(size=(b, t, h, d)), jnp.float16)
    k, v = jnp.asarray(rng.normal(size=(2, b, t, g, d)), jnp.float16)
    cache_k, cache_v = jnp.asarray(rng.normal(size=(2, 2, b, slots, g, d)), jnp.float16)
    fixed_valid = jnp.array([0, 1, fixed_slots, 9])
    ring_valid = jnp.array([0, slots - fixed_slots, 1, 0])

    @functools.partial(jax.jit, static_argnames="impl")
    def run(*arrays, impl):
        lengths = dict(fixed_slots=fixed_slots, fixed_valid=fixed_valid, ring_valid=ring_valid)
        out, gradients = jax.vjp(lambda *x: ring_attention(*x, layer=1, **lengths, impl=impl), *arrays)
        return out, gradients(q)

    ours, reference = (run(q, k, v, cache_k, cache_v, impl=impl) for impl in ("cudnn", "xla"))
    np.testing.assert_allclose(ours[0].astype(jnp.float32), reference[0].astype(jnp.float32), atol=4e-3)
    for one, other in zip(ours[1], reference[1], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("t, a", [(5, 3), (4, 3), (3, 4)])
@pytest.mark.parametrize("lengths", [None, [1, 2, 3]])
def test_cudnn_gets_even_lengths_and_answers_the_same(monkeypatch, t, a, lengths):
    """Its gradients refuse odd ones."""
    plain = jax.nn.dot_product_attention

    def stand_in(q, k, v, *, key_value_seq_lengths, implementation):
        assert implementation == "cudnn" and not (q.shape[1] % 2 or k.shape[1] % 2 or v.shape[1] % 2)
        return plain(q, k, v, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, length, 2, 8)), jnp.float16) for length in (t, a, a))
    valid = None if lengths is None else jnp.array(lengths)
    group = _cudnn.attend_groups(q, k, v, valid)
    frame = frame_attention(q[None], k[None], v[None], valid=None if valid is None else valid[None], impl="xla")[0]
    np.testing.assert_allclose(group.astype(jnp.float32), frame.astype(jnp.float32), atol=4e-3)


def test_on_cuda_auto_is_cudnn_where_it_takes_the_arrays(monkeypatch):
    """Programs for CUDA, as they are chosen where a device is present; the call itself is marked by a cosine."""
    monkeypatch.setattr(_common, "cuda_present", lambda: True)
    monkeypatch.setattr(_cudnn, "attend", lambda q, *_: (jnp.cos(q), q[..., 0].astype(jnp.float32)))
    monkeypatch.setattr(_cudnn, "attend_groups", lambda q, *_: jnp.cos(q))

    def program(fn, arrays, platform):
        return jax.jit(fn).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()

    def ring(*arrays):
        return ring_attention(*arrays, **RING)

    def frame(q):
        return frame_attention(q[None], q[None], q[None])

    for dtype in (jnp.bfloat16, jnp.float32):
        arrays = ring_arrays(dtype=dtype)
        for fn, given_arrays in ((ring, arrays), (frame, arrays[:1])):
            assert ("cosine" in program(fn, given_arrays, "cuda")) == (dtype == jnp.bfloat16)
            assert "cosine" not in program(fn, given_arrays, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("counted", [False, True])
def test_cudnn_by_frame(counted):
    if not _common.cuda_present():
        pytest.skip("no CUDA device")
    rng = np.random.default_rng(0)
    q, d_out = jnp.asarray(rng.normal(size=(2, 1, 3, 70, 4, 64)), jnp.float16)
    k, v = jnp.asarray(rng.normal(size=(2, 1, 3, 24, 2, 64)), jnp.float16)
    valid = jnp.array([[0, 7, 24]]) if counted else None

    def run(impl):
        out, gradients = jax.vjp(lambda *x: frame_attention(*x, valid=valid, impl=impl), q, k, v)
        return out, *gradients(d_out)

    for ours, reference in zip(run("cudnn"), run("xla"), strict=True):
        ours, reference = ours.astype(jnp.float32), reference.astype(jnp.float32)
        np.testing.assert_allclose(ours, reference, atol=0.01 * float(jnp.abs(reference).max()))
