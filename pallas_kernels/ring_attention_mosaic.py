"""Streaming attention over up to three segments of keys, for NVIDIA Hopper: compiled; its check on an H200 did not end within 84 seconds (`benchmarks/results`).

The structure is FlashAttention-3's (Shah et al. 2024, arXiv:2407.08608): one warpgroup only moves keys and values with TMA, two
compute 64 query rows each and take turns, so that one's softmax runs under the other's matrix product.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels import _mosaic as mosaic
from pallas_kernels._mosaic import CHUNK, ROWS

WARPGROUPS = 2  # that compute
KEYS = 128  # keys of one tile
MEMORY_REGISTERS, COMPUTE_REGISTERS = 56, 224  # (56 + 2 x 224) x 128 threads just fit a multiprocessor's 65,536


class Tile(NamedTuple):
    """A tile of keys: which segment, from which row of it, how many of its `KEYS` keys count."""

    fixed: Array  # bool: in the fixed rows
    own: Array  # bool: among the chunk's own keys; the ring where neither
    row: Array
    count: Array


class Tiles:
    """The order in which the tiles of the three segments are visited.

    The ragged last tile of each segment comes first, so that only those few steps pay for a mask. Softmax does not mind the order, and a
    tile with a key to see comes first, so the running maximum is finite from the first step on.
    """

    def __init__(self, fixed: Array, ring: Array, own: Array):
        """Valid keys of each segment; their sum must be positive."""
        block = jnp.int32(KEYS)
        self._full = [lax.div(n, block) for n in (fixed, ring, own)]
        self._rest = [lax.rem(n, block) for n in (fixed, ring, own)]
        self._has_rest = [(rest > 0).astype(jnp.int32) for rest in self._rest]
        self.ragged = sum(self._has_rest)
        self.total = self.ragged + sum(self._full)

    def __getitem__(self, step: Array) -> Tile:
        ragged = step < self.ragged
        place = step - self.ragged  # among the full tiles
        fixed = jnp.where(ragged, step < self._has_rest[0], place < self._full[0])
        own = jnp.where(ragged, step >= self._has_rest[0] + self._has_rest[1], place >= self._full[0] + self._full[1])

        def of_segment(values):
            return jnp.where(fixed, values[0], jnp.where(own, values[2], values[1]))

        before = of_segment([jnp.int32(0), self._full[0], self._full[0] + self._full[1]])
        return Tile(
            fixed=fixed,
            own=own,
            row=KEYS * jnp.where(ragged, of_segment(self._full), place - before),
            count=jnp.where(ragged, of_segment(self._rest), KEYS),
        )


def stages(head_dim: int) -> int:
    """Tiles of keys and of values in flight: 128 KiB of shared memory."""
    return 2 * 128 // head_dim


@functools.partial(jax.jit, static_argnames=("fixed_slots",))
def streaming_attention(
    q: BFloat16[Array, "b t h d"],
    k: BFloat16[Array, "b s g d"],
    v: BFloat16[Array, "b s g d"],
    cache: tuple[BFloat16[Array, "l b c g d"], BFloat16[Array, "l b c g d"]] | None,
    lengths: Int[Array, "b 4"],
    *,
    fixed_slots: int,
) -> BFloat16[Array, "b t h d"]:
    """Every query sees the first keys of `k` and of the two parts of one layer of the cache.

    It has a `jit` of its own and takes the layer as data, so that all layers of an unrolled model share one lowering.

    Args:
      q, k, v: queries, own keys and values; d is 64 or 128, h a multiple of g.
      cache: keys and values of all layers, read in place; None where there are none.
      lengths: of every batch row: the layer to read, valid fixed rows, valid ring slots, valid own keys; at least one key is valid.
      fixed_slots: where in the cache the ring begins.
    """
    batch, t, heads, d = q.shape
    kv_heads = k.shape[2]
    depth = stages(d)
    chunks = range(d // CHUNK)

    def kernel(*refs):
        q_ref, k_ref, v_ref, *cache_refs, lengths_ref, out_ref = refs[:-7]
        q_tiles, k_tiles, v_tiles, loaded_q, (loaded_k, loaded_v), (read_k, read_v), turn = refs[-7:]
        warpgroup = lax.axis_index("warpgroup")
        row, head, block = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("queries")
        layer, fixed, ring, own = (lengths_ref[row, i] for i in range(4))
        plan = Tiles(fixed, ring, own)
        scale = mosaic.LOG2_E / math.sqrt(d)  # softmax in base 2

        def slot_of(step):
            return lax.rem(step, jnp.int32(depth))

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(warpgroup < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            q_tile = q_tiles.at[warpgroup]
            first = (block * WARPGROUPS + warpgroup) * ROWS
            mosaic.load(q_ref.at[row, pl.ds(first, ROWS), head], q_tile, loaded_q.at[warpgroup])
            plgpu.barrier_wait(loaded_q.at[warpgroup])
            plgpu.barrier_wait(loaded_k.at[0])
            pl.when(warpgroup == 1)(take_turns)

            def attend(step, carry, *, ragged: bool):
                acc, largest, total = carry
                slot = slot_of(step)

                def q_k(logits_ref):
                    for chunk in chunks:
                        plgpu.wgmma(logits_ref, mosaic.matrix(q_tile.at[chunk]), mosaic.matrix(k_tiles.at[slot, chunk]).T)
                    take_turns()
                    return logits_ref[...]

                logits = pl.run_scoped(q_k, plgpu.ACC((ROWS, KEYS), jnp.float32))
                plgpu.barrier_arrive(read_k.at[slot])
                if ragged:
                    logits = mosaic.hide_columns(logits, plan[step].count)
                new_largest = jnp.maximum(largest, logits.max(axis=1) * scale)
                shrink = jnp.exp2(largest - new_largest)
                weights = jnp.exp2(logits * scale - mosaic.along_rows(new_largest, KEYS))
                total = total * shrink + weights.sum(axis=1)
                acc = [part * mosaic.along_rows(shrink, CHUNK) for part in acc]
                weights = weights.astype(q_ref.dtype)
                # Pinned, or the compiler would move the softmax under the wait for the other warpgroup.
                acc, total, new_largest, weights = lax.optimization_barrier((acc, total, new_largest, weights))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(loaded_v.at[slot])
                plgpu.barrier_wait(turn)

                def p_v(*product_refs):
                    for chunk in chunks:
                        plgpu.wgmma(product_refs[chunk], weights, mosaic.matrix(v_tiles.at[slot, chunk]))

                    @pl.when(step + 1 < plan.total)
                    def _():
                        plgpu.barrier_wait(loaded_k.at[slot_of(step + 1)])

                    return [product_ref[...] for product_ref in product_refs]

                products = pl.run_scoped(p_v, *(plgpu.ACC((ROWS, CHUNK), jnp.float32) for _ in chunks))
                acc = [part + product for part, product in zip(acc, products, strict=True)]
                plgpu.barrier_arrive(read_v.at[slot])
                return acc, new_largest, total

            carry = [mosaic.zeros(ROWS, CHUNK) for _ in chunks], mosaic.rows_filled(-jnp.inf), mosaic.rows_filled(0.0)
            carry = lax.fori_loop(0, plan.ragged, functools.partial(attend, ragged=True), carry)
            acc, _, total = lax.fori_loop(plan.ragged, plan.total, functools.partial(attend, ragged=False), carry)
            pl.when(warpgroup == 0)(take_turns)

            for chunk in chunks:
                mosaic.matrix(q_tile.at[chunk])[...] = (acc[chunk] / mosaic.along_rows(total, CHUNK)).astype(q_ref.dtype)
            mosaic.store(q_tile, out_ref.at[row, pl.ds(first, ROWS), head])

        @pl.when(warpgroup == WARPGROUPS)
        def _move():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            group = lax.div(head, jnp.int32(heads // kv_heads))

            def move(source, which, step):
                """Rows past a segment's end are other slots' (finite, hidden in the logits), past the array's end zeros."""
                here = plan[step]
                slot = slot_of(step)
                target, loaded, read = [(k_tiles, loaded_k, read_k), (v_tiles, loaded_v, read_v)][which]

                @pl.when(step >= depth)
                def _():
                    plgpu.barrier_wait(read.at[slot])

                @pl.when(here.own)
                def _():
                    mosaic.load(source.at[row, pl.ds(here.row, KEYS), group], target.at[slot], loaded.at[slot])

                if cache is None:
                    return

                @pl.when(~here.own)
                def _():
                    start = here.row + jnp.where(here.fixed, 0, fixed_slots)
                    part = cache_refs[which].at[layer, row, pl.ds(start, KEYS), group]
                    mosaic.load(part, target.at[slot], loaded.at[slot])

            @pl.loop(0, plan.total)
            def _(step):
                move(k_ref, 0, step)
                move(v_ref, 1, step)

            # Every phase of a barrier is waited for before the barrier goes: nothing is left open at the end of a block.
            @pl.loop(jnp.maximum(plan.total - depth, 0), plan.total)
            def _(step):
                plgpu.barrier_wait(read_k.at[slot_of(step)])
                plgpu.barrier_wait(read_v.at[slot_of(step)])

    loaded = plgpu.Barrier(num_arrivals=len(chunks), num_barriers=depth)
    consumed = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=depth)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            mosaic.tiles(WARPGROUPS, ROWS, d),
            mosaic.tiles(depth, KEYS, d),
            mosaic.tiles(depth, KEYS, d),
            plgpu.Barrier(num_arrivals=len(chunks), num_barriers=WARPGROUPS),
            (loaded, loaded),
            (consumed, consumed),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        # Neighbours in time are the blocks of one head: its keys and values come from memory once and then from the second-level cache,
        # which holds a head's (3.2 MB at 9B) but not a layer's (102 MB).
        grid=(pl.cdiv(t, WARPGROUPS * ROWS), heads, batch),
        grid_names=("queries", "heads", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=mosaic.COMPILER_PARAMS,
    )(q, k, v, *(cache or ()), lengths)


def attend(q, k, v, cache_k, cache_v, fixed_valid, ring_valid, *, layer: int, fixed_slots: int) -> Float[Array, "b t h d"]:
    """`ring_attention` by one kernel; arguments as there.

    Raises:
      ValueError: arrays that the kernel cannot take.
    """
    mosaic.check_limits("ring_attention", q, k, v, cache_k, cache_v)
    fixed = jnp.clip(fixed_valid, 0, fixed_slots)
    ring = jnp.clip(ring_valid, 0, cache_k.shape[2] - fixed_slots)
    lengths = jnp.stack([jnp.full_like(fixed, layer), fixed, ring, jnp.full_like(fixed, k.shape[1])], axis=1)
    cache = (cache_k, cache_v) if cache_k.shape[2] else None
    return streaming_attention(q, k, v, cache, lengths.astype(jnp.int32), fixed_slots=fixed_slots)
