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


def ring_write(
    ring: Float[Array, "b s *x"], rows: Float[Array, "b n *x"], count: Int[Array, "b"], frames: int, tokens: int
) -> Float[Array, "b s *x"]:
    """Writes whole frames of new rows over the oldest.

    Args:
      ring: frames * tokens rows.
      rows: new rows, a number of frames that divides `frames`, so that they never straddle the ring's end.
      count: frames written before, a multiple of the new frames.
      frames: frames that the ring holds.
      tokens: rows of a frame.
    """

    def write(ring, rows, count):
        start = (count % frames * tokens,) + (0,) * (ring.ndim - 1)
        return jax.lax.dynamic_update_slice(ring, rows.astype(ring.dtype), start)

    return jax.vmap(write)(ring, rows, count)
