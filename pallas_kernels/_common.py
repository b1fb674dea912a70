"""What the front doors share: the choice of implementation and the masked softmax product."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

IMPLEMENTATIONS = ("auto", "xla")


def check_implementation(kernel: str, impl: str) -> None:
    """Raises ValueError unless `kernel` has the implementation `impl`."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{kernel}: impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")


def attention_logits(q: Float[Array, "*b t h d"], k: Float[Array, "*b s g d"]) -> Float[Array, "*b g r t s"]:
    """q k^T / sqrt(d) in float32; the `h` query heads in `g` groups of `r`, one key head each."""
    *batch, t, h, d = q.shape
    g = k.shape[-2]
    q = q.reshape(*batch, t, g, h // g, d)
    return jnp.einsum("...tgrd,...sgd->...grts", q, k, preferred_element_type=jnp.float32) * d**-0.5


def softmax_product(
    logits: Float[Array, "*b g r t s"],
    v: Float[Array, "*b s g d"],
    visible: Bool[Array, "..."] | None = None,
) -> Float[Array, "*b t h d"]:
    """softmax(logits) v, the softmax in float32.

    Args:
      visible: what a query may see, broadcastable to [*b, t, s]; None means everything.
    """
    if visible is not None:
        logits = jnp.where(visible[..., None, None, :, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("...grts,...sgd->...tgrd", weights, v)
    return out.reshape(*out.shape[:-3], -1, out.shape[-1])
