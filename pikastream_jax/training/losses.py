"""Reconstruction losses and image measures, and what lips that should be closed cost."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pikastream_jax.measuring.lipsync import CLOSED


def region_weights(
    boxes: Float[Array, "*b n 4"], height: int, width: int, weights: tuple[float, ...], origin: Float[Array, "*b 2"] | None = None
) -> Float[Array, "*b h w"]:
    """1 everywhere, more inside boxes.

    Args:
      boxes: (y0, x0, y1, x1) in pixels of the whole picture.
      weights: what each of the n boxes adds.
      origin: (y, x) of the crop's first pixel in the whole picture.
    """
    y = jnp.arange(height, dtype=jnp.float32)
    x = jnp.arange(width, dtype=jnp.float32)
    if origin is not None:
        y = y + origin[..., 0:1]
        x = x + origin[..., 1:2]
    total = 1.0
    for index, weight in enumerate(weights):
        y0, x0, y1, x1 = (boxes[..., index, i, None] for i in range(4))
        inside = ((y >= y0) & (y < y1))[..., :, None] & ((x >= x0) & (x < x1))[..., None, :]
        total = total + weight * inside
    return total


def reconstruction_loss(
    output: Float[Array, "*b h w c"], target: Float[Array, "*b h w c"], weight: Float[Array, "*b h w"]
) -> Float[Array, ""]:
    """Absolute and squared error, and the absolute error of the gradients (edges), weighted per pixel.

    Pictures are in [-1, 1]. The squared error pulls the largest mistakes down, the gradients keep edges sharp; a perceptual
    network is not at hand.
    """
    weight = (weight / jnp.mean(weight))[..., None]
    error = output - target
    dy = error[..., 1:, :, :] - error[..., :-1, :, :]
    dx = error[..., :, 1:, :] - error[..., :, :-1, :]
    pixel = jnp.mean(weight * (jnp.abs(error) + 2.0 * error * error))
    edges = jnp.mean(weight[..., 1:, :, :] * jnp.abs(dy)) + jnp.mean(weight[..., :, 1:, :] * jnp.abs(dx))
    return pixel + 0.5 * edges


def motion_loss(
    output: Float[Array, "*b t h w c"], target: Float[Array, "*b t h w c"], weight: Float[Array, "*b t h w"]
) -> Float[Array, ""]:
    """Absolute and squared error of the change from frame to frame, weighted per pixel.

    Lips move within a latent frame's few video frames. A still mouth in the middle of that motion costs the other losses little, so a
    small model settles there and the lips look drawn out; here it costs the whole motion.
    """
    error = output - target
    weight = weight[..., 1:, :, :] / jnp.mean(weight)
    change = error[..., 1:, :, :, :] - error[..., :-1, :, :, :]
    return jnp.mean(weight[..., None] * (jnp.abs(change) + 2.0 * change * change))


def closure_loss(logit: Float[Array, "*b"], opening: Float[Array, "*b"]) -> Float[Array, ""]:
    """Binary cross-entropy, in nats, of "the lips are closed in this video frame".

    Args:
      opening: the true one; closed is what lip sync is measured by, an opening below `lipsync.CLOSED`.
    """
    return jnp.mean(jax.nn.softplus(jnp.where(opening < CLOSED, -logit, logit)))


def psnr(squared_error: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Peak signal-to-noise ratio in dB of a mean squared error between pictures in [-1, 1] (peak 2)."""
    return 10.0 * jnp.log10(4.0 / jnp.maximum(squared_error, 1e-10))
