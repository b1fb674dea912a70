"""What a reward looks at: a clip as a viewer gets it, always in the same size, with the picture and the sound it was made from."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SIDE = 128  # pixels each way of every picture that a reward sees, whatever the preset makes
FRAMES_PER_LATENT = 4  # video frames in a latent frame
MEL_PER_LATENT = 16  # mel frames in a latent frame


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shown:
    """A batch of clips of f latent frames, t = 4 f video frames."""

    video: Float[Array, "b t 128 128 3"]  # in [-1, 1], made by `canonical`
    reference: Float[Array, "b 128 128 3"]  # likewise, the picture of the person
    mel: Float[Array, "b f 16 k"]  # normalised log-mel of just these latent frames: the last 16 frames of each one's slice

    def check(self) -> None:
        """Raises ValueError where the shapes do not belong together."""
        b, t, *picture = self.video.shape
        f = t // FRAMES_PER_LATENT
        if picture != [SIDE, SIDE, 3] or self.reference.shape != (b, SIDE, SIDE, 3):
            raise ValueError(
                f"rewards look at pictures of {SIDE}x{SIDE}, got video {list(self.video.shape)} and reference "
                f"{list(self.reference.shape)}: pass both through `canonical`"
            )
        if t % FRAMES_PER_LATENT or self.mel.shape[:3] != (b, f, MEL_PER_LATENT):
            raise ValueError(
                f"video of {t} frames needs mel [{b}, {t / FRAMES_PER_LATENT:g}, {MEL_PER_LATENT}, bands], got "
                f"{list(self.mel.shape)}: give whole latent frames, {MEL_PER_LATENT} mel frames each"
            )


def canonical(video: Float[Array, "*b h w 3"]) -> Float[Array, "*b 128 128 3"]:
    """The middle square of every picture at 128x128.

    Antialiased linear resampling, so that it is differentiable and small pictures of large ones do not flicker.
    """
    h, w = video.shape[-3:-1]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = video[..., top : top + side, left : left + side, :].astype(jnp.float32)
    if side == SIDE:
        return square
    return jax.image.resize(square, (*video.shape[:-3], SIDE, SIDE, 3), "linear", antialias=True)
