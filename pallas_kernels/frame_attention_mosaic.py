"""Attention to a few keys, for NVIDIA Hopper: right on an H200 (`benchmarks/results`), not timed.

All keys and values of one frame and head lie in shared memory, so there is no loop over keys and no running maximum: one product, the
softmax in registers, one product. Queries are read once and results written once; what limits it is memory traffic.
"""

import math
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels import _mosaic as mosaic
from pallas_kernels._common import with_gradients_of
from pallas_kernels._mosaic import CHUNK, ROWS
from pallas_kernels.ring_attention_mosaic import streaming_attention

MOST_KEYS = 128  # forward: their logits [64, 128] and the result fit a warpgroup's registers
MOST_KEYS_BACKWARD = 64  # backward: so must two matrices of logits and the gradients of keys and values


def _weights(logits, count, d: int):
    """Softmax over the first `count` keys: [rows, keys] and its sum [rows], not yet divided."""
    logits = mosaic.hide_columns(logits, count)
    scale = mosaic.LOG2_E / math.sqrt(d)
    weights = jnp.exp2(logits * scale - mosaic.along_rows(logits.max(axis=1) * scale, logits.shape[1]))
    return weights, weights.sum(axis=1)


def _multiply(pairs, rows: int, columns: int):
    """Sum of the products of (left, right) pairs, in float32 registers."""

    def run(product_ref):
        for left, right in pairs:
            plgpu.wgmma(product_ref, left, right)
        return product_ref[...]

    return pl.run_scoped(run, plgpu.ACC((rows, columns), jnp.float32))


def padded(keys: int) -> int:
    """Rows of the key tile in shared memory."""
    return pl.cdiv(keys, CHUNK) * CHUNK


@jax.jit
def attend_few(
    q: BFloat16[Array, "n t h d"], k: BFloat16[Array, "n a g d"], v: BFloat16[Array, "n a g d"], valid: Int[Array, "n"]
) -> BFloat16[Array, "n t h d"]:
    """Every query sees the first `valid` keys (1 to a) of its frame; a at most `MOST_KEYS`, d 64 or 128, h a multiple of g."""
    n, t, heads, d = q.shape
    keys, ratio, chunks = padded(k.shape[1]), heads // k.shape[2], range(d // CHUNK)

    def kernel(q_ref, k_ref, v_ref, valid_ref, out_ref, q_tile, k_tile, v_tile, loaded):
        frame, head, block = lax.axis_index("frames"), lax.axis_index("heads"), lax.axis_index("queries")
        group, rows = lax.div(head, jnp.int32(ratio)), pl.ds(block * ROWS, ROWS)
        mosaic.load(k_ref.at[frame, pl.ds(0, keys), group], k_tile, loaded.at[0])
        mosaic.load(q_ref.at[frame, rows, head], q_tile, loaded.at[1])
        mosaic.load(v_ref.at[frame, pl.ds(0, keys), group], v_tile, loaded.at[2])
        count = valid_ref[frame]
        plgpu.barrier_wait(loaded.at[0])
        plgpu.barrier_wait(loaded.at[1])
        logits = _multiply([(mosaic.matrix(q_tile.at[c]), mosaic.matrix(k_tile.at[c]).T) for c in chunks], ROWS, keys)
        weights, total = _weights(logits, count, d)
        weights = weights.astype(q_ref.dtype)
        plgpu.barrier_wait(loaded.at[2])
        for c in chunks:
            product = _multiply([(weights, mosaic.matrix(v_tile.at[c]))], ROWS, CHUNK)
            mosaic.matrix(q_tile.at[c])[...] = (product / mosaic.along_rows(total, CHUNK)).astype(q_ref.dtype)
        mosaic.store(q_tile, out_ref.at[frame, rows, head])

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            mosaic.tiles(ROWS, d),
            mosaic.tiles(keys, d),
            mosaic.tiles(keys, d),
            plgpu.Barrier(num_arrivals=len(chunks), num_barriers=3),
        ],
        grid=(pl.cdiv(t, ROWS), heads, n),
        grid_names=("queries", "heads", "frames"),
        compiler_params=mosaic.COMPILER_PARAMS,
    )(q, k, v, valid)


@jax.jit
def attend_few_gradients(
    q: BFloat16[Array, "n t h d"],
    k: BFloat16[Array, "n a g d"],
    v: BFloat16[Array, "n a g d"],
    valid: Int[Array, "n"],
    d_out: BFloat16[Array, "n t h d"],
) -> tuple[BFloat16[Array, "n t h d"], BFloat16[Array, "n a g d"], BFloat16[Array, "n a g d"]]:
    """Gradients of `attend_few` to q, k and v; a at most `MOST_KEYS_BACKWARD`.

    One block owns `CHUNK` columns of one frame and key head and walks over all its query tiles (and query heads), so the gradients of keys
    and values add up in registers, in float32, always in the same order. The softmax is computed again, by the block of either half of a
    head of 128: with all keys at hand nothing need be saved for it, and both halves' gradients at once do not fit the registers.
    """
    n, t, heads, d = q.shape
    keys, ratio, chunks = padded(k.shape[1]), heads // k.shape[2], range(d // CHUNK)
    blocks = pl.cdiv(t, ROWS)

    def kernel(q_ref, k_ref, v_ref, valid_ref, d_out_ref, dq_ref, dk_ref, dv_ref, *scratch):
        q_tiles, d_out_tiles, k_tile, v_tile, dq_tile, weights_tile, d_logits_tile, loaded_keys, loaded = scratch
        frame, group, part = lax.axis_index("frames"), lax.axis_index("groups"), lax.axis_index("parts")
        columns = pl.ds(part * CHUNK, CHUNK)

        def place(step):
            """Frame, rows and query head of a step."""
            return frame, pl.ds(lax.rem(step, jnp.int32(blocks)) * ROWS, ROWS), group * ratio + lax.div(step, jnp.int32(blocks))

        def fetch(step):
            slot = lax.rem(step, jnp.int32(2))
            mosaic.load(q_ref.at[place(step)], q_tiles.at[slot], loaded.at[slot])
            mosaic.load(d_out_ref.at[place(step)], d_out_tiles.at[slot], loaded.at[slot])

        mosaic.load(k_ref.at[frame, pl.ds(0, keys), group], k_tile, loaded_keys)
        mosaic.load(v_ref.at[frame, pl.ds(0, keys), group], v_tile, loaded_keys)
        fetch(jnp.int32(0))
        count = valid_ref[frame]
        plgpu.barrier_wait(loaded_keys)

        def add(step, carry):
            dk, dv = carry

            @pl.when(step + 1 < blocks * ratio)
            def _():
                fetch(step + 1)

            slot = lax.rem(step, jnp.int32(2))
            plgpu.barrier_wait(loaded.at[slot])
            q_tile, d_out_tile = ([mosaic.matrix(tile.at[slot, c]) for c in chunks] for tile in (q_tiles, d_out_tiles))
            k_chunks, v_chunks = ([mosaic.matrix(tile.at[c]) for c in chunks] for tile in (k_tile, v_tile))

            weights, total = _weights(_multiply([(q_tile[c], k_chunks[c].T) for c in chunks], ROWS, keys), count, d)
            weights = weights / mosaic.along_rows(total, keys)
            d_weights = _multiply([(d_out_tile[c], v_chunks[c].T) for c in chunks], ROWS, keys)
            d_logits = weights * (d_weights - mosaic.along_rows((weights * d_weights).sum(axis=1), keys))
            weights_matrix, d_logits_matrix = mosaic.matrix(weights_tile.at[0]), mosaic.matrix(d_logits_tile.at[0])
            weights_matrix[...] = weights.astype(q_ref.dtype)
            d_logits_matrix[...] = d_logits.astype(q_ref.dtype)
            plgpu.commit_smem()

            dv += _multiply([(weights_matrix.T, mosaic.matrix(d_out_tiles.at[slot, part]))], keys, CHUNK)
            dk += _multiply([(d_logits_matrix.T, mosaic.matrix(q_tiles.at[slot, part]))], keys, CHUNK)
            dq = _multiply([(d_logits_matrix, mosaic.matrix(k_tile.at[part]))], ROWS, CHUNK) * d**-0.5
            mosaic.matrix(dq_tile.at[0])[...] = dq.astype(q_ref.dtype)
            mosaic.store(dq_tile, dq_ref.at[(*place(step), columns)])
            return dk, dv

        dk, dv = lax.fori_loop(0, blocks * ratio, add, (mosaic.zeros(keys, CHUNK), mosaic.zeros(keys, CHUNK)))
        for total, tile, target in ((dk * d**-0.5, k_tile, dk_ref), (dv, v_tile, dv_ref)):
            mosaic.matrix(tile.at[0])[...] = total.astype(q_ref.dtype)
            mosaic.store(tile.at[pl.ds(0, 1)], target.at[frame, pl.ds(0, keys), group, columns])

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_types=[
            mosaic.tiles(2, ROWS, d),
            mosaic.tiles(2, ROWS, d),
            mosaic.tiles(keys, d),
            mosaic.tiles(keys, d),
            mosaic.tiles(ROWS, CHUNK),
            mosaic.tiles(ROWS, keys),
            mosaic.tiles(ROWS, keys),
            plgpu.Barrier(num_arrivals=2 * len(chunks)),
            plgpu.Barrier(num_arrivals=2 * len(chunks), num_barriers=2),
        ],
        grid=(len(chunks), k.shape[2], n),
        grid_names=("parts", "groups", "frames"),
        compiler_params=mosaic.COMPILER_PARAMS,
    )(q, k, v, valid, d_out)


def attend(reference: Callable, q: Array, k: Array, v: Array, valid: Array | None = None) -> Float[Array, "n t h d"]:
    """Frame-wise attention with frames as the batch [n, tokens, heads, head dim]: the kernel for few keys, or that of the ring.

    Args:
      reference: the definition, whose gradients are taken where there is no kernel for them.
      valid: how many keys count [n]; None means all.

    Raises:
      ValueError: arrays that the kernels cannot take.
    """
    mosaic.check_limits("frame_attention", q, k, v)
    keys = k.shape[1]
    valid = jnp.full(k.shape[:1], keys, jnp.int32) if valid is None else jnp.clip(valid, 1, keys).astype(jnp.int32)
    if keys > MOST_KEYS:
        return with_gradients_of(reference, _stream)(q, k, v, valid)
    if keys > MOST_KEYS_BACKWARD:
        return with_gradients_of(reference, attend_few)(q, k, v, valid)
    return _attend_few(q, k, v, valid)


def _stream(q, k, v, valid):
    zero = jnp.zeros_like(valid)
    return streaming_attention(q, k, v, None, jnp.stack([zero, zero, zero, valid], axis=1), fixed_slots=0)


@jax.custom_vjp
def _attend_few(q, k, v, valid):
    return attend_few(q, k, v, valid)


def _attend_few_backward(arrays, d_out):
    return *attend_few_gradients(*arrays, d_out), None


_attend_few.defvjp(lambda *arrays: (attend_few(*arrays), arrays), _attend_few_backward)
