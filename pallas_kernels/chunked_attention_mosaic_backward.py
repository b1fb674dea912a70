"""The backward kernels of the training attention for NVIDIA Hopper (Mosaic GPU). Right on an H200 (`benchmarks/results`), not timed.

Softmax weights are computed again from the saved log-sum-exp; delta = rowsum(d_out x out) stands for the gradient through the sum
(FlashAttention-2, arXiv 2307.08691). Two kernels, so that nothing is added up in global memory: `query_gradient` walks over the keys its
queries see, `key_value_gradients` over the queries that see its keys, and over the query heads of the group. The chunked and the fixed part
have their own queries, keys and values but one log-sum-exp and one delta, so each kernel is called for either part.

Walks, tiles and masks are those of the forward kernel. Hidden weights are set to 0 after the exponential, which is infinite where nothing
is visible: there, in the padding, the log-sum-exp is about -1e30.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels._mosaic import LOG2_E
from pallas_kernels.chunked_attention_mosaic_tiles import (
    COMPILER_PARAMS,
    COMPUTE_REGISTERS,
    FETCH_REGISTERS,
    KEYS,
    ROWS,
    TILE,
    WARPGROUPS,
    Walk,
    after_last_use,
    after_use,
    hide,
    operand,
    products,
)
from pallas_kernels.chunked_attention_ranges import Ranges

QUERIES = 64  # queries in one step of `key_value_gradients`


def moving(wg, start):
    """`wg`, in a form the compiler cannot take out of the walk: it would keep the addresses of 16 operands in registers, and spill others."""
    return wg + jnp.minimum(start, 0)  # no token has a number below 0


def query_gradient(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g d"],
    d_out: Float[Array, "b n h d"],
    lse: Float[Array, "b h p"],
    delta: Float[Array, "b h p"],
    ranges: Ranges,
) -> Float[Array, "b n h d"]:
    """The gradient of the queries. `ranges` are the queries', in tiles of `TILE`; `lse` in base 2, as `forward` gives it."""
    batch, n, heads, d = q.shape
    group = heads // k.shape[2]
    parts, padded = ranges.rows.shape[1] // 2, ranges.rows.shape[2]
    stages = 2 if d == 128 else 4

    def kernel(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, rows_ref, tiles_ref, dq_ref, *scratch):
        q_smem, d_out_smem, k_smem, v_smem, lse_smem, delta_smem, rows_smem, *barriers = scratch
        tile_loaded, loaded, used = barriers
        tile, head, row = (lax.axis_index(name) for name in ("tile", "head", "row"))
        wg = lax.axis_index("warpgroup")
        walk = Walk(tiles_ref, row, tile, ranges=parts, step=KEYS)

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            tokens = pl.ds(tile * TILE + wg * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[row, tokens, head], q_smem.at[wg], tile_loaded.at[wg])
            plgpu.copy_gmem_to_smem(d_out_ref.at[row, tokens, head], d_out_smem.at[wg], tile_loaded.at[wg])
            plgpu.copy_gmem_to_smem(lse_ref.at[row, head, tokens], lse_smem.at[wg], tile_loaded.at[wg])
            plgpu.copy_gmem_to_smem(delta_ref.at[row, head, tokens], delta_smem.at[wg], tile_loaded.at[wg])
            plgpu.copy_gmem_to_smem(rows_ref.at[row, :, tokens], rows_smem.at[wg], tile_loaded.at[wg])
            plgpu.barrier_wait(tile_loaded.at[wg])
            tile_lse, tile_delta = lse_smem[wg], delta_smem[wg]

            def accumulate(dq):
                def step(index, _):
                    slot = lax.rem(index, jnp.int32(stages))
                    part, start, cut = walk.at(index)
                    here = moving(wg, start)
                    shape = (ROWS, KEYS)
                    plgpu.barrier_wait(loaded.at[slot])
                    logits, d_weights = products((q_smem.at[here], k_smem.at[slot].T), (d_out_smem.at[here], v_smem.at[slot].T), shape=shape)
                    weights = jnp.exp2(logits * (d**-0.5 * LOG2_E) - lax.broadcast_in_dim(tile_lse, shape, [0]))
                    weights = lax.cond(cut, lambda x: hide(x, rows_smem.at[wg], part, start, hidden=0.0), lambda x: x, weights)
                    d_logits = weights * (d_weights - lax.broadcast_in_dim(tile_delta, shape, [0]))
                    plgpu.wgmma(dq, d_logits.astype(jnp.bfloat16), k_smem.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(used.at[slot])
                    return ()

                lax.fori_loop(0, walk.total, step, ())
                return dq[...]

            dq = pl.run_scoped(accumulate, plgpu.ACC((ROWS, d), jnp.float32))
            q_smem[wg] = (dq * d**-0.5).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[wg], dq_ref.at[row, tokens, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
            key_head = lax.div(head, jnp.int32(group))

            def step(index, _):
                slot = lax.rem(index, jnp.int32(stages))
                _, start, _ = walk.at(index)
                keys = (row, pl.ds(start, KEYS), key_head)
                after_use(used, slot, index, stages)
                plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[slot], loaded.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[slot], loaded.at[slot])
                return ()

            lax.fori_loop(0, walk.total, step, ())
            after_last_use((used,), walk.total, stages)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(padded // TILE, heads, batch),
        grid_names=("tile", "head", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=(
            operand(WARPGROUPS, ROWS, d),
            operand(WARPGROUPS, ROWS, d),
            operand(stages, KEYS, d),
            operand(stages, KEYS, d),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, 2 * parts, ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=5, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        ),
        compiler_params=COMPILER_PARAMS,
    )(q, k, v, d_out, lse, delta, ranges.rows, ranges.tiles)


def key_value_gradients(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g d"],
    d_out: Float[Array, "b n h d"],
    lse: Float[Array, "b h p"],
    delta: Float[Array, "b h p"],
    ranges: Ranges,
) -> tuple[Float[Array, "b m g d"], Float[Array, "b m g d"]]:
    """The gradients of keys and values, summed over the query heads of their group. `ranges` are the keys', in tiles of `TILE`."""
    batch, m, groups, d = k.shape
    group = q.shape[2] // groups
    parts, padded = ranges.rows.shape[1] // 2, ranges.rows.shape[2]
    stages = 3 if d == 128 else 4

    def kernel(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, rows_ref, tiles_ref, dk_ref, dv_ref, *scratch):
        k_smem, v_smem, q_smem, d_out_smem, lse_smem, delta_smem, rows_smem, *barriers = scratch
        tile_loaded, loaded, used = barriers
        tile, key_head, row = (lax.axis_index(name) for name in ("tile", "head", "row"))
        wg = lax.axis_index("warpgroup")
        walk = Walk(tiles_ref, row, tile, ranges=parts, step=QUERIES)

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            tokens = pl.ds(tile * TILE + wg * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(k_ref.at[row, tokens, key_head], k_smem.at[wg], tile_loaded.at[wg])
            plgpu.copy_gmem_to_smem(v_ref.at[row, tokens, key_head], v_smem.at[wg], tile_loaded.at[wg])
            plgpu.copy_gmem_to_smem(rows_ref.at[row, :, tokens], rows_smem.at[wg], tile_loaded.at[wg])
            plgpu.barrier_wait(tile_loaded.at[wg])

            def accumulate(dk, dv):
                def step(index, _):
                    slot = lax.rem(index, jnp.int32(stages))
                    part, start, cut = walk.at(lax.rem(index, walk.total) if group > 1 else index)
                    here = moving(wg, start)
                    shape = (ROWS, QUERIES)  # everything transposed: keys are the rows
                    plgpu.barrier_wait(loaded.at[slot])
                    logits, d_weights = products((k_smem.at[here], q_smem.at[slot].T), (v_smem.at[here], d_out_smem.at[slot].T), shape=shape)
                    weights = jnp.exp2(logits * (d**-0.5 * LOG2_E) - lax.broadcast_in_dim(lse_smem[slot], shape, [1]))
                    weights = lax.cond(cut, lambda x: hide(x, rows_smem.at[wg], part, start, hidden=0.0), lambda x: x, weights)
                    d_logits = weights * (d_weights - lax.broadcast_in_dim(delta_smem[slot], shape, [1]))
                    plgpu.commit_smem()  # lse and delta were read by threads: ordered before TMA writes there again
                    plgpu.wgmma(dv, weights.astype(jnp.bfloat16), d_out_smem.at[slot])
                    plgpu.wgmma(dk, d_logits.astype(jnp.bfloat16), q_smem.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(used.at[slot])
                    return ()

                lax.fori_loop(0, walk.total * group, step, ())
                return dk[...], dv[...]

            accumulators = (plgpu.ACC((ROWS, d), jnp.float32), plgpu.ACC((ROWS, d), jnp.float32))
            dk, dv = pl.run_scoped(accumulate, *accumulators)
            k_smem[wg] = (dk * d**-0.5).astype(jnp.bfloat16)
            v_smem[wg] = dv.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem.at[wg], dk_ref.at[row, tokens, key_head])
            plgpu.copy_smem_to_gmem(v_smem.at[wg], dv_ref.at[row, tokens, key_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

            def step(index, _):
                slot = lax.rem(index, jnp.int32(stages))
                head = key_head * group + (lax.div(index, walk.total) if group > 1 else 0)
                _, start, _ = walk.at(lax.rem(index, walk.total) if group > 1 else index)
                queries = pl.ds(start, QUERIES)
                after_use(used, slot, index, stages)
                plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem.at[slot], loaded.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[row, head, queries], lse_smem.at[slot], loaded.at[slot])
                plgpu.copy_gmem_to_smem(d_out_ref.at[row, queries, head], d_out_smem.at[slot], loaded.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[row, head, queries], delta_smem.at[slot], loaded.at[slot])
                return ()

            lax.fori_loop(0, walk.total * group, step, ())
            after_last_use((used,), walk.total * group, stages)

    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid=(padded // TILE, groups, batch),
        grid_names=("tile", "head", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=(
            operand(WARPGROUPS, ROWS, d),
            operand(WARPGROUPS, ROWS, d),
            operand(stages, QUERIES, d),
            operand(stages, QUERIES, d),
            plgpu.SMEM((stages, QUERIES), jnp.float32),
            plgpu.SMEM((stages, QUERIES), jnp.float32),
            plgpu.SMEM((WARPGROUPS, 2 * parts, ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        ),
        compiler_params=COMPILER_PARAMS,
    )(q, k, v, d_out, lse, delta, ranges.rows, ranges.tiles)
