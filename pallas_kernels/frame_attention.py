"""Cross-attention in which a group of queries (a latent frame, a chunk) sees only its own keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._common import attention, check_implementation


def frame_attention(
    q: Float[Array, "b f t h d"],
    k: Float[Array, "b f a g d"],
    v: Float[Array, "b f a g d"],
    *,
    valid: Int[Array, "b f"] | None = None,
    impl: str = "auto",
) -> Float[Array, "b f t h d"]:
    """Each group's queries against that group's keys: audio frame by frame, text chunk by chunk.

    Args:
      q: queries, `t` to a group.
      k, v: keys and values, `a` to a group.
      valid: how many of the `a` keys count; None means all. A group with none valid averages its values.
      impl: "auto" or "xla".

    Raises:
      ValueError: an unknown `impl`.
    """
    check_implementation("frame_attention", impl)
    visible = None
    if valid is not None:
        visible = (jnp.arange(k.shape[2]) < valid[..., None])[:, :, None, :]
    return attention((q, k, v, visible))
