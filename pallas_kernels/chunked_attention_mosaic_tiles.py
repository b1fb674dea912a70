"""What the three kernels of the training attention share: tiles, walks over ranges, masks, products on the tensor cores."""


import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels._mosaic import ROWS
from pallas_kernels.chunked_attention_ranges import ALIGNMENT

WARPGROUPS = 2  # that compute; one more fetches
TILE = WARPGROUPS * ROWS
KEYS = 128  # keys in one step
COMPILER_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True)
COMPUTE_REGISTERS, FETCH_REGISTERS = 232, 40  # of a thread: 2 x 232 + 40 = 3 x 168, what the launch gives each


def operand(*shape: int) -> plgpu.SMEM:
    """Shared memory for bfloat16 operands of wgmma, filled by TMA."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


class Walk:
    """The steps of a tile over its ranges, `step` tokens of the other side at a time, as numbers known at run time only."""

    def __init__(self, tiles, batch, tile, *, ranges: int, step: int):
        bounds = [tiles[batch, tile, i] for i in range(4 * ranges)]
        self.step = step
        self.bounds = [bounds[4 * i : 4 * i + 4] for i in range(ranges)]
        ends, total = [], jnp.int32(0)
        for first, last, _, _ in self.bounds:
            total = total + lax.div(last - first + (step - 1), jnp.int32(step))
            ends.append(total)
        self.ends, self.total = ends, total

    def at(self, index):
        """Of step `index`: its range, its first token there, and whether some row's bound may cut through it."""
        part, past = jnp.int32(0), jnp.int32(0)
        first, _, inside, outside = self.bounds[0]
        for i in range(1, len(self.bounds)):
            here = index >= self.ends[i - 1]
            part, past = jnp.where(here, i, part), jnp.where(here, self.ends[i - 1], past)
            next_first, _, next_inside, next_outside = self.bounds[i]
            first = jnp.where(here, next_first, first)
            inside, outside = jnp.where(here, next_inside, inside), jnp.where(here, next_outside, outside)
        start = pl.multiple_of(first + (index - past) * self.step, ALIGNMENT)
        return part, start, (start < inside) | (start + self.step > outside)


def hide(x: Float[Array, "r c"], rows, part, start, *, hidden: float) -> Float[Array, "r c"]:
    """`hidden` in place of the columns, numbered from `start`, outside the bounds of their row in range `part` (`rows`: [2 ranges, r])."""
    first, last = rows[2 * part], rows[2 * part + 1]
    column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA) + start
    seen = (column >= lax.broadcast_in_dim(first, x.shape, [0])) & (column < lax.broadcast_in_dim(last, x.shape, [0]))
    return jnp.where(seen, x, hidden)


def products(*pairs: tuple, shape: tuple[int, int]) -> list[Float[Array, "r c"]]:
    """a @ b in float32 of every pair (a, b), issued together; `b` lies in shared memory."""

    def multiply(*accumulators):
        for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(accumulator, a, b)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(multiply, *[plgpu.ACC(shape, jnp.float32) for _ in pairs])


def after_use(used, slot, index, stages: int) -> None:
    """Waits until `slot`, one of `stages` that take turns, is free for step `index`."""
    pl.when(index >= stages)(lambda: plgpu.barrier_wait(used.at[slot]))


def after_last_use(used: tuple, total, stages: int) -> None:
    """Waits, behind `total` steps, until every slot was used for the last time: no arrival is left unseen."""

    def step(index, _):
        for barriers in used:
            after_use(barriers, lax.rem(index, jnp.int32(stages)), index, stages)
        return ()

    lax.fori_loop(total, total + stages, step, ())
