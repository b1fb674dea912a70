"""What the front doors share: the choice of implementation, gradients by the reference, and the softmax product that defines all."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_HIDDEN = -1e30  # added to a logit: its weight is 0


def check_implementation(kernel: str, impl: str, implementations: Sequence[str]) -> None:
    """Raises ValueError unless `kernel` has the implementation `impl`."""
    if impl not in implementations:
        raise ValueError(f"{kernel}: impl {impl!r} is not one of {', '.join(implementations)}")


@functools.cache
def cuda_present() -> bool:
    """Whether a CUDA device is usable that cuDNN's fused attention runs on (Ampere or newer): only then may its calls be traced at all."""
    try:
        return all(float(device.compute_capability) >= 8.0 for device in jax.devices("cuda"))
    except RuntimeError:
        return False


def on_cuda(cuda: Callable, default: Callable, *arrays: Array) -> Array:
    """`cuda(*arrays)` in a program for CUDA, `default(*arrays)` in any other, and where there is no CUDA device nothing else is traced."""
    if not cuda_present():
        return default(*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=cuda, default=default)


def with_gradients_of(reference: Callable, kernel: Callable) -> Callable:
    """`kernel`, differentiated as `reference`: both take the same arrays. Kept from the forward pass are the arguments alone."""

    @jax.custom_vjp
    def run(*arrays):
        return kernel(*arrays)

    def backward(arrays, d_out):
        return jax.vjp(reference, *arrays)[1](d_out)

    run.defvjp(lambda *arrays: (kernel(*arrays), arrays), backward)
    return run


def attention(
    *parts: tuple[Float[Array, "*b t h d"], Float[Array, "*b s g d"], Float[Array, "*b s g d"], Bool[Array, "..."] | None],
) -> Float[Array, "*b t h d"]:
    """One softmax over the keys of all parts, in float32; the `h` query heads in groups, one of the `g` key heads each.

    A group's query heads are folded into rows of one matrix product, nothing is concatenated, the mask is added and the sum divides the
    product instead of the weights. Parts without keys are skipped, so an absent reference may be zero tokens.

    Args:
      parts: (q, k, v, visible) each; t, h and d are the same in all. `visible` is what a query may see, broadcastable to [*b, t, s];
        None means everything. At least one part has keys.
    """
    *batch, t, h, d = parts[0][0].shape
    logits, values = [], []
    for q, k, v, visible in parts:
        if k.shape[-3] == 0:
            continue
        g = k.shape[-2]
        rows = jnp.moveaxis((q * d**-0.5).reshape(*batch, t, g, h // g, d), -4, -2).reshape(*batch, g, h // g * t, d)
        part = jnp.matmul(rows, jnp.moveaxis(k, -3, -1), preferred_element_type=jnp.float32)
        if visible is not None:
            bias = jnp.where(visible, 0.0, _HIDDEN)[..., None, None, :, :]
            part = (part.reshape(*batch, g, h // g, t, -1) + bias).reshape(part.shape)
        logits.append(part)
        values.append(jnp.swapaxes(v, -3, -2))
    # Softmax is the same whatever is subtracted, so no gradient needs to pass here.
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [part.max(axis=-1, keepdims=True) for part in logits]))
    weights = [jnp.exp(part - largest) for part in logits]
    total = sum(weight.sum(axis=-1, keepdims=True) for weight in weights)
    product = sum(
        jnp.matmul(weight.astype(v.dtype), v, preferred_element_type=jnp.float32) for weight, v in zip(weights, values, strict=True)
    )
    out = (product / total).astype(values[0].dtype)
    return jnp.moveaxis(out.reshape(*batch, g, h // g, t, d), -2, -4).reshape(*batch, t, h, d)
