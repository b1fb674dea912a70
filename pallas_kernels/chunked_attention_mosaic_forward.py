"""The forward kernel of the training attention (`chunked_attention_mosaic.py` tells the design). Right on an H200, not timed."""

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


def forward(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n g d"],
    v: Float[Array, "b n g d"],
    fixed: tuple[Float[Array, "b n h d"], Float[Array, "b m g d"], Float[Array, "b m g d"]] | tuple[()],
    ranges: Ranges,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b h p"]]:
    """Attention and, for the backward pass, the base-2 logarithm of every query's softmax sum.

    Args:
      q, k, v: bfloat16; d is 64 or 128.
      fixed: (queries, keys, values) of the last range, or nothing.
      ranges: of the queries, in tiles of `TILE`.
    """
    batch, n, heads, d = q.shape
    group = heads // k.shape[2]
    parts, padded = ranges.rows.shape[1] // 2, ranges.rows.shape[2]
    stages = 2 if d == 128 else 4
    sources = 2 if fixed else 1

    def kernel(*refs):
        q_refs, k_refs, v_refs = (refs[i : 3 * sources : 3] for i in range(3))
        rows_ref, tiles_ref, out_ref, lse_ref, q_smem, k_smem, v_smem, rows_smem, lse_smem, *barriers = refs[3 * sources :]
        q_loaded, k_loaded, v_loaded, k_used, v_used, turn = barriers
        tile, head, row = (lax.axis_index(name) for name in ("tile", "head", "row"))
        group_of_threads = lax.axis_index("warpgroup")
        walk = Walk(tiles_ref, row, tile, ranges=parts, step=KEYS)

        @pl.when(group_of_threads < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            wg = group_of_threads
            tokens = pl.ds(tile * TILE + wg * ROWS, ROWS)
            for i, q_ref in enumerate(q_refs):
                plgpu.copy_gmem_to_smem(q_ref.at[row, tokens, head], q_smem.at[i, wg], q_loaded.at[wg])
            plgpu.copy_gmem_to_smem(rows_ref.at[row, :, tokens], rows_smem.at[wg], q_loaded.at[wg])
            plgpu.barrier_wait(q_loaded.at[wg])

            def change_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            # Half a step behind: from here on one multiplies while the other is in its softmax.
            pl.when(wg == 1)(change_turns)

            def step(index, carry):
                out, largest, total = carry
                slot = lax.rem(index, jnp.int32(stages))
                part, start, cut = walk.at(index)
                source = jnp.where(part == parts - 1, 1, 0) if fixed else 0
                plgpu.barrier_wait(k_loaded.at[slot])
                (logits,) = products((q_smem.at[source, wg], k_smem.at[slot].T), shape=(ROWS, KEYS))
                change_turns()
                plgpu.barrier_arrive(k_used.at[slot])
                logits = lax.cond(cut, lambda x: hide(x, rows_smem.at[wg], part, start, hidden=-jnp.inf), lambda x: x, logits)
                # Logits in base 2: scale and subtraction are one multiply-add before the exponential.
                scale = d**-0.5 * LOG2_E
                new_largest = jnp.maximum(largest, logits.max(axis=1) * scale)
                weights = jnp.exp2(logits * scale - lax.broadcast_in_dim(new_largest, logits.shape, [0]))
                shrink = jnp.exp2(largest - new_largest)
                total = total * shrink + weights.sum(axis=1)
                weights = weights.astype(jnp.bfloat16)
                plgpu.barrier_wait(v_loaded.at[slot])
                change_turns()
                (added,) = products((weights, v_smem.at[slot]), shape=(ROWS, d))
                plgpu.barrier_arrive(v_used.at[slot])
                return out * lax.broadcast_in_dim(shrink, out.shape, [0]) + added, new_largest, total

            # The least logit is finite, so that rows that have seen nothing yet give weights of 0 and no NaN.
            start = (jnp.zeros((ROWS, d), jnp.float32), jnp.full((ROWS,), -1e30, jnp.float32), jnp.zeros((ROWS,), jnp.float32))
            out, largest, total = lax.fori_loop(0, walk.total, step, start)
            pl.when(wg == 0)(change_turns)
            total = jnp.maximum(total, 1e-30)  # 0 only in the padding, which must not become NaN: it enters products with weights of 0
            q_smem[0, wg] = (out / lax.broadcast_in_dim(total, out.shape, [0])).astype(jnp.bfloat16)
            lse_smem[wg] = largest + jnp.log2(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[0, wg], out_ref.at[row, tokens, head])  # what lies behind token n is dropped
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[row, head, tokens])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group_of_threads == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
            key_head = lax.div(head, jnp.int32(group))

            def step(index, _):
                slot = lax.rem(index, jnp.int32(stages))
                part, start, _ = walk.at(index)
                for used, loaded, smem, source_refs in (
                    (k_used, k_loaded, k_smem, k_refs),
                    (v_used, v_loaded, v_smem, v_refs),
                ):
                    after_use(used, slot, index, stages)

                    def copy(ref, smem=smem, loaded=loaded):
                        where = ref.at[row, pl.ds(start, KEYS), key_head]
                        plgpu.copy_gmem_to_smem(where, smem.at[slot], loaded.at[slot])

                    if fixed:
                        pl.when(part < parts - 1)(lambda ref=source_refs[0], copy=copy: copy(ref))
                        pl.when(part == parts - 1)(lambda ref=source_refs[1], copy=copy: copy(ref))
                    else:
                        copy(source_refs[0])
                return ()

            lax.fori_loop(0, walk.total, step, ())
            after_last_use((k_used, v_used), walk.total, stages)

    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32)),
        grid=(padded // TILE, heads, batch),
        grid_names=("tile", "head", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=(
            operand(sources, WARPGROUPS, ROWS, d),
            operand(stages, KEYS, d),
            operand(stages, KEYS, d),
            plgpu.SMEM((WARPGROUPS, 2 * parts, ROWS), jnp.int32),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=sources + 1, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        compiler_params=COMPILER_PARAMS,
    )(q, k, v, *fixed, ranges.rows, ranges.tiles)
