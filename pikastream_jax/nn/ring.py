"""The rolling window of keys and values: an explicit ring buffer whose counters are per batch row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ring_ages(count: Int[Array, "b"], slots: int) -> Int[Array, "b s"]:
    """How many frames ago each slot was written, 1 for the newest; slots not yet written give ages past `count`.

    Args:
      count: frames written so far.
      slots: frames that the ring holds.
    """
    return (count[:, None] - 1 - jnp.arange(slots)) % slots + 1


def write_rows(cache: Float[Array, "l b s *x"], rows: Float[Array, "l b n *x"], start: Int[Array, "b"]) -> Float[Array, "l b s *x"]:
    """Overwrites slots [start, start + n) of every layer, each batch row at its own place.

    Row by row, not by `vmap`, which would make a scatter of it: this way XLA writes a donated cache in place. A start beyond s - n would be
    clamped silently (`jax.lax.dynamic_update_slice`), so whole frames must fit the ring evenly.
    """
    for row in range(cache.shape[1]):
        place = (0, row, start[row]) + (0,) * (cache.ndim - 3)
        cache = jax.lax.dynamic_update_slice(cache, rows[:, row : row + 1].astype(cache.dtype), place)
    return cache
