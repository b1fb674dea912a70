"""The discriminator of adversarial fine-tuning: is this piece of video filmed or decoded?

A patch discriminator (Isola et al., "Image-to-image translation with conditional adversarial networks", 2017) over space and time: every
answer looks at 38x38 pixels of 7 video frames, so that it judges texture, edges and their motion, not what the picture shows. Convolutions
over space and mixing over time take turns (2+1D), which costs a fraction of 3D kernels. There is no normalisation: the gradient penalty
R1 keeps it in bounds (`training/adversarial.py`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

SPATIAL_STRIDE, TEMPORAL_STRIDE = 8, 4  # pixels and video frames from one answer to the next
_SLOPE = 0.2  # of the leaky ReLU


class Discriminator(nnx.Module):
    """Video in [-1, 1] -> an answer per place and time: above 0 filmed, below 0 decoded."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        """dim: channels after the first convolution; doubled twice.

        Raises:
          ValueError: dim below 1.
        """
        if dim < 1:
            raise ValueError(f"discriminator: dim {dim} must be at least 1")
        widths = (3, dim, 2 * dim, 4 * dim)
        self.space = nnx.List(
            [nnx.Conv(i, o, (4, 4), strides=(2, 2), rngs=rngs) for i, o in zip(widths[:-1], widths[1:], strict=True)]
        )
        self.time = nnx.List([nnx.Linear(3 * width, width, rngs=rngs) for width in widths[2:]])
        self.head = nnx.Conv(widths[-1], 1, (3, 3), rngs=rngs)

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b s r c"]:
        """s = t / 4, r = h / 8, c = w / 8.

        Raises:
          ValueError: t is not a multiple of 4, or h or w of 8.
        """
        t, h, w = video.shape[1:4]
        if t % TEMPORAL_STRIDE or h % SPATIAL_STRIDE or w % SPATIAL_STRIDE:
            raise ValueError(
                f"discriminator: {t} frames of {h}x{w} pixels must be multiples of {TEMPORAL_STRIDE} frames and {SPATIAL_STRIDE} pixels; "
                "change the clip's length or the crop"
            )
        x = jax.nn.leaky_relu(self.space[0](video), _SLOPE)
        for space, time in zip(self.space[1:], self.time, strict=True):
            x = jax.nn.leaky_relu(space(x), _SLOPE)
            x = jax.nn.leaky_relu(time(_neighbours(x)), _SLOPE)
        return self.head(x)[..., 0]


def _neighbours(x: Float[Array, "b t h w d"]) -> Float[Array, "b s h w e"]:
    """Every second frame with the frames before and after it, side by side as channels (e = 3 d); zeros beyond the ends."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([padded[:, i : i + x.shape[1] : 2] for i in range(3)], axis=-1)
