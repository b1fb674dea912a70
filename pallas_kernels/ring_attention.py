"""Attention of the current chunk over the rolling cache and itself: the inference path of both models."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._common import attention, check_implementation


def ring_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t g d"],
    v: Float[Array, "b t g d"],
    cache_k: Float[Array, "l b s g d"],
    cache_v: Float[Array, "l b s g d"],
    *,
    layer: int,
    fixed_slots: int,
    fixed_valid: Int[Array, "b"],
    ring_valid: Int[Array, "b"],
    impl: str = "auto",
) -> Float[Array, "b t h d"]:
    """Every query of the chunk sees the chunk's own keys and every valid slot of one layer of the cache.

    Slots [0, fixed_slots) are the fixed rows (reference, then sink), of which the first `fixed_valid` count; the rest is the
    ring, of which the first `ring_valid` slots count. Softmax does not mind order, so a ring needs no unrolling and no mask
    beyond these two lengths.

    Args:
      q: queries of the chunk, rotated to their places.
      k, v: the chunk's own keys (rotated) and values; `g` divides `h`.
      cache_k, cache_v: all layers' caches, keys already rotated relative to this chunk.
      layer: which layer to read.
      fixed_slots: how many slots at the front are fixed rows.
      fixed_valid, ring_valid: valid slots of either part, per batch row; each row may be another session.
      impl: "auto" or "xla".

    Raises:
      ValueError: an unknown `impl`, or more fixed slots than slots.
    """
    check_implementation("ring_attention", impl)
    slots = cache_k.shape[2]
    if fixed_slots > slots:
        raise ValueError(f"ring_attention: fixed_slots {fixed_slots} exceeds the cache's {slots} slots")
    slot = jnp.arange(slots)
    valid = jnp.where(slot < fixed_slots, slot < fixed_valid[:, None], slot - fixed_slots < ring_valid[:, None])
    return attention((q, cache_k[layer], cache_v[layer], valid[:, None]), (q, k, v, None))
