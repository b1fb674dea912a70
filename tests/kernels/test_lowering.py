"""Every Mosaic kernel lowers for CUDA on a machine without one, at the shapes that the full-size models give it."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import frame_attention, ring_attention


def lower(fn, *arrays):
    return jax.jit(fn).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def kernels(program: str) -> int:
    return program.count("@mosaic_gpu")


# Batch, tokens of the chunk, heads, key heads, head dim, layers, fixed slots, slots.
RINGS = {
    "9b, 3 latent frames": (1, 1170, 32, 32, 128, 30, 390, 5070),
    "9b, 1 latent frame": (1, 390, 32, 32, 128, 30, 390, 5070),
    "9b, 4 chunks in flight": (1, 4680, 32, 32, 128, 30, 390, 5070),
    "9b, 4 sessions": (4, 1170, 32, 32, 128, 30, 390, 5070),
    "1.3b": (1, 4680, 12, 12, 128, 30, 1560, 29640),
    "flash_vae decoder": (1, 1560, 16, 4, 64, 12, 0, 3120),
    "flash_vae decoder, 4 sessions": (4, 1560, 16, 4, 64, 12, 0, 3120),
    "no cache yet": (1, 1170, 32, 32, 128, 1, 0, 0),
}


@pytest.mark.parametrize("name", RINGS)
def test_ring(name):
    b, t, h, g, d, layers, fixed_slots, slots = RINGS[name]

    def two_layers(q, k, v, cache_k, cache_v, fixed_valid, ring_valid, impl="mosaic"):
        for layer in sorted({0, layers - 1}):
            lengths = dict(fixed_slots=fixed_slots, fixed_valid=fixed_valid, ring_valid=ring_valid)
            q = ring_attention(q, k, v, cache_k, cache_v, layer=layer, **lengths, impl=impl)
        return q

    own, cache = bf16(b, t, g, d), bf16(layers, b, slots, g, d)
    arrays = bf16(b, t, h, d), own, own, cache, cache, int32(b), int32(b)
    program = lower(two_layers, *arrays)
    assert kernels(program) == 1  # all layers share one lowering
    # The cache is read in place: nothing but the kernel takes it, whole, and no piece of it is made.
    piece = re.compile(rf"stablehlo\.(dynamic_)?slice.*tensor<{layers}x{b}x{slots}x")
    assert not piece.search(program)
    assert piece.search(lower(functools.partial(two_layers, impl="xla"), *arrays)) or not slots  # which does make one


# Batch, groups, queries, heads, key heads, head dim, keys, whether their number is data.
FRAMES = {
    "9b audio": (1, 3, 390, 32, 32, 128, 32, False),
    "1.3b audio": (1, 3, 1560, 12, 12, 128, 32, False),
    "9b training audio": (2, 21, 390, 32, 32, 128, 64, False),
    "two tiles of keys": (1, 3, 390, 32, 8, 64, 100, True),
    "9b text": (1, 1, 1170, 32, 32, 128, 128, True),
    "1.3b text": (1, 1, 4680, 12, 12, 128, 512, True),
    "flash_vae refinement": (1, 1, 6240, 8, 8, 64, 6240, False),
    "9b reference": (1, 1, 390, 32, 32, 128, 390, False),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frame(name):
    b, f, t, h, g, d, a, counted = FRAMES[name]

    def attention(q, k, v, valid):
        return frame_attention(q, k, v, valid=valid if counted else None, impl="mosaic")

    def gradients(q, k, v, valid, d_out):
        return jax.vjp(lambda *x: attention(*x, valid), q, k, v)[1](d_out)

    q, k, valid = bf16(b, f, t, h, d), bf16(b, f, a, g, d), int32(b, f)
    assert kernels(lower(attention, q, k, k, valid)) == 1
    # Gradients by a kernel of their own, or, with many keys, by XLA's from the arguments alone.
    assert kernels(lower(gradients, q, k, k, valid, q)) == (1 if a <= 64 else 0)
