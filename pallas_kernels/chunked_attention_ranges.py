"""Chunk-causal visibility as ranges: what a kernel needs instead of a mask.

Frames are numbered through the copies, 0 .. copies x f - 1. What a frame sees, and what sees a frame, is never more than two runs of
neighbouring frames:

| frame of | sees | is seen by |
|---|---|---|
| the only copy | the window before its chunk and its chunk: one run | its chunk and the later chunks whose windows reach it: one run |
| the context copy | the same | that run, and those later chunks' queries |
| the query copy | the window before its chunk in the context copy; its chunk in the query copy | its chunk |

So a key is visible to a token when its number lies in one of two ranges, [first, last) each, and a tile of tokens needs no key outside
the union of its tokens' ranges.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

ALIGNMENT = 8  # the hardware fetches operands in rows of 8: a walk over keys begins at a multiple of it
_NONE = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ranges:
    """Of every token of one side (queries, or keys for the transposed product), which tokens of the other side it meets.

    Attributes:
      rows: [b, 2 r, p]: first and last (exclusive, equal to first where empty) of each of r ranges for every token; p is the number of tokens, padded to whole
        tiles, and the padding meets nothing.
      tiles: [b, t, 4 r]: for every tile of tokens and each range its union over the tokens (first, rounded down to a multiple of `ALIGNMENT`, last), and the part inside which
        every token of the tile meets everything (first, last), where no comparison is needed.
    """

    rows: Int[Array, "b r2 p"]
    tiles: Int[Array, "b t r4"]


def _runs(chunk_ids: Int[Array, "b f"]) -> tuple[Int[Array, "b f"], Int[Array, "b f"]]:
    """First frame of every frame's chunk, and the frame after its last one."""
    frames = chunk_ids.shape[1]
    same = chunk_ids[:, :, None] == chunk_ids[:, None, :]
    return jnp.argmax(same, axis=2), frames - jnp.argmax(same[:, :, ::-1], axis=2)


def visible_frames(chunk_ids: Int[Array, "b f"], *, window: int, copies: int) -> Int[Array, "b cf 4"]:
    """The frames every frame sees, as two ranges (first, last, first, last); see `frame_visibility` for the arguments."""
    start, end = _runs(chunk_ids)
    past, nothing = jnp.maximum(start - window, 0), jnp.zeros_like(start)
    context = jnp.stack([past, end, nothing, nothing], axis=-1)
    if copies == 1:
        return context.astype(jnp.int32)
    query = jnp.stack([past, start, start + chunk_ids.shape[1], end + chunk_ids.shape[1]], axis=-1)
    return jnp.concatenate([context, query], axis=1).astype(jnp.int32)


def seeing_frames(chunk_ids: Int[Array, "b f"], *, window: int, copies: int) -> Int[Array, "b cf 4"]:
    """The frames that see every frame, as two ranges: `visible_frames` transposed."""
    start, end = _runs(chunk_ids)
    frames, nothing = chunk_ids.shape[1], jnp.zeros_like(start)
    # Chunks start later and later, so those whose window reaches back to frame i are the ones up to a last frame.
    starts_in_reach = start[:, None, :] <= jnp.arange(frames)[None, :, None] + window
    reach = jnp.maximum(starts_in_reach.sum(axis=2), end)
    context = jnp.stack([start, reach, nothing, nothing], axis=-1)
    if copies == 1:
        return context.astype(jnp.int32)
    later = jnp.where((reach > end)[..., None], jnp.stack([end, reach], axis=-1) + frames, 0)
    context = jnp.concatenate([context[..., :2], later], axis=-1)
    query = jnp.stack([start + frames, end + frames, nothing, nothing], axis=-1)
    return jnp.concatenate([context, query], axis=1).astype(jnp.int32)


def token_ranges(frame_ranges: Int[Array, "b cf r2"], *, tokens: int, tile: int) -> Ranges:
    """Ranges of frames as ranges of tokens, `tokens` to a frame, for tiles of `tile` tokens that may straddle frames."""
    rows = jnp.repeat(jnp.moveaxis(frame_ranges, 1, 2) * tokens, tokens, axis=2)
    return _with_tiles(rows, tile)


def full_range(*, batch: int, tokens: int, others: int, tile: int) -> Ranges:
    """Every one of `tokens` tokens meets all of `others` tokens: the fixed part, in one range."""
    rows = jnp.broadcast_to(jnp.array([0, others], jnp.int32)[None, :, None], (batch, 2, tokens))
    return _with_tiles(rows, tile)


def joined(a: Ranges, b: Ranges) -> Ranges:
    """The ranges of `a` followed by those of `b`."""
    return Ranges(
        rows=jnp.concatenate([a.rows, b.rows], axis=1),
        tiles=jnp.concatenate([a.tiles, b.tiles], axis=2),
    )


def _with_tiles(rows: Int[Array, "b r2 n"], tile: int) -> Ranges:
    rows = jnp.pad(rows, [(0, 0), (0, 0), (0, -rows.shape[2] % tile)])
    batch, double, padded = rows.shape
    first, last = jnp.moveaxis(rows.reshape(batch, double // 2, 2, padded // tile, tile), 2, 0)
    least = jnp.where(first < last, first, _NONE).min(axis=-1)
    most = jnp.where(first < last, last, 0).max(axis=-1)
    union = jnp.stack([jnp.where(most > 0, least // ALIGNMENT * ALIGNMENT, 0), most], axis=-1)
    # A token with an empty range leaves nothing inside: the whole union is compared.
    inside = jnp.stack([first.max(axis=-1), last.min(axis=-1)], axis=-1)
    tiles = jnp.concatenate([union, inside], axis=-1)  # [b, r, t, 4]
    return Ranges(rows=rows, tiles=jnp.moveaxis(tiles, 1, 2).reshape(batch, padded // tile, 2 * double))
