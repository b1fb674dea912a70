"""Rotary position embedding in three dimensions (time, height, width), interleaved pairs, as in Wan 2.1.

The head is split between the axes in the proportion 44 / 42 / 42 of a 128-wide head. Positions are floats, so a place may be
relative to the current chunk (negative for the past) and never grows with the stream.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def axis_split(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's channels turn with time, height and width; all even, sum `head_dim`.

    >>> axis_split(128)
    (44, 42, 42)
    """
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_tables(
    time: Float[Array, "*b t"], row: Float[Array, "*b t"], column: Float[Array, "*b t"], head_dim: int, theta: float = 10_000.0
) -> tuple[Float[Array, "*b t 1 p"], Float[Array, "*b t 1 p"]]:
    """Cosines and sines for tokens at (time, row, column), one pair of channels each, ready to broadcast over heads."""
    angles = []
    for position, width in zip((time, row, column), axis_split(head_dim), strict=True):
        frequency = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        angles.append(position[..., None] * frequency.astype(np.float32))
    angle = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]


def rotate(x: Float[Array, "*b t h d"], tables: tuple[Float[Array, "*b t 1 p"], Float[Array, "*b t 1 p"]]) -> Float[Array, "*b t h d"]:
    """Turns each pair (2i, 2i + 1) of channels by its token's angle, in float32."""
    cos, sin = tables
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def grid_positions(frames: Float[Array, "*b f"], rows: int, columns: int) -> tuple[Float[Array, "*b n"], ...]:
    """(time, row, column) of every token of whole frames, frame by frame, n = f x rows x columns.

    Args:
      frames: the place in time of every frame.
    """
    shape = (*frames.shape, rows, columns)
    time = jnp.broadcast_to(frames[..., None, None], shape)
    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.float32)[:, None], shape)
    column = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.float32), shape)
    flat = (*frames.shape[:-1], -1)
    return time.reshape(flat), row.reshape(flat), column.reshape(flat)
