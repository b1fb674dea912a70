"""What the Mosaic GPU kernels share: compiler parameters, tiles in shared memory, the softmax update, limits.

Only `plgpu.kernel` is used, never `pl.pallas_call`, which means two different things on jax 0.10 (Mosaic) and 0.11 (Triton).
Facts of the hardware: CUDA C++ Programming Guide (tensor memory access, wgmma); what plgpu's calls do: the sources of jax 0.10.2
and 0.11.2 (`jax/_src/pallas/mosaic_gpu`).
"""

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

HEAD_DIMS = (64, 128)
ROWS = 64  # query rows of one warpgroup: the height of one wgmma
LOG2_E = math.log2(math.e)
CHUNK = 64  # columns of a tile in shared memory: one swizzled line of 128 bytes of bfloat16

# Lane is the default on jax 0.10 but not on 0.11; the other, Warpgroup, chooses the tiling of a buffer by itself, and one that both TMA
# and wgmma accept exists only where every first row is a multiple of 8. `approx_math` makes exp2 one instruction.
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def tiles(*shape: int):
    """Shared memory for bfloat16 tiles: [..., rows, head dim] as [..., head dim / CHUNK, rows / 8, 1, 8, CHUNK], lines swizzled.

    TMA sees each chunk as [rows, CHUNK] (`lines`), wgmma as blocks of 8 rows (`matrix`): the same bytes. A buffer declared with blocks
    would make TMA count in blocks of 8 rows too, and neither 390 tokens nor a segment that begins at row 390 would be allowed. (Where all
    are multiples of 8, both ways compile to the same instructions but for the coordinates that TMA is given.)
    """
    *leading, rows, columns = shape
    return plgpu.SMEM((*leading, columns // CHUNK, rows // 8, 1, 8, CHUNK), jnp.bfloat16, transforms=(plgpu.SwizzleTransform(128),))


def lines(chunk):
    """One chunk of a tile as TMA sees it: [rows, CHUNK]."""
    return chunk.reshape(8 * chunk.shape[0], CHUNK)


def matrix(chunk):
    """One chunk of a tile as wgmma and register stores see it: [rows, CHUNK]."""
    return type(chunk)(chunk.ref, (*chunk.transforms, plgpu.TilingTransform((8, CHUNK)).undo(None)))


def load(source, target, barrier) -> None:
    """Copies rows [rows, head dim] in global memory to a tile; the barrier expects one arrival a chunk.

    Rows past the end of the array arrive as zeros.
    """
    for chunk in range(target.shape[0]):
        plgpu.copy_gmem_to_smem(source.at[:, pl.ds(chunk * CHUNK, CHUNK)], lines(target.at[chunk]), barrier)


def store(source, target) -> None:
    """The way back of `load`: rows past the end of the array are dropped. Returns once the tiles may be written again."""
    plgpu.commit_smem()
    for chunk in range(source.shape[0]):
        plgpu.copy_smem_to_gmem(lines(source.at[chunk]), target.at[:, pl.ds(chunk * CHUNK, CHUNK)])
    plgpu.wait_smem_to_gmem(0)


def rows_filled(value: float, rows: int = ROWS) -> jax.Array:
    """[rows] float32 in registers, laid out as the row reductions of a wgmma result."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def zeros(rows: int, columns: int) -> jax.Array:
    """[rows, columns] float32 zeros in registers, laid out as a wgmma result."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA)


def along_rows(x: jax.Array, columns: int) -> jax.Array:
    """[rows] -> [rows, columns]."""
    return jax.lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def hide_columns(logits: jax.Array, count: jax.Array | int) -> jax.Array:
    """Logits [rows, keys] with -inf from key `count` on; `count` must be at least 1, or the row has no finite largest logit."""
    key = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(key < count, logits, -jnp.inf)


def check_limits(kernel: str, q: jax.Array, *others: jax.Array) -> None:
    """Raises ValueError where the Mosaic kernels cannot take these arrays: [..., heads, head dim], queries first."""
    for x in (q, *others):
        if x.dtype != jnp.bfloat16:
            raise ValueError(f"{kernel}: impl 'mosaic' takes bfloat16 arrays, not {x.dtype}; cast them or choose impl 'xla'")
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"{kernel}: impl 'mosaic' takes head dim {' or '.join(map(str, HEAD_DIMS))}, not {q.shape[-1]}; choose impl 'xla'")
    for x in others:
        if q.shape[-2] % x.shape[-2]:
            raise ValueError(f"{kernel}: {q.shape[-2]} query heads are not a multiple of {x.shape[-2]} key heads")
