"""Do the lips go with the sound? SyncNet's form (Chung and Zisserman 2016, "Out of time: automated lip sync in the wild").

One network embeds the mouth of 8 video frames, another the mel of the same 0.32 s; where both say the same the cosine is high. A clip's score
is the mean cosine of windows with their own sound minus that with the sound of the clip's other windows, SyncNet's "confidence": without
the second part a mouth that goes with everything a little would pay.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.rewards.network import Calibration, Trunk, unit
from pikastream_jax.rewards.shown import FRAMES_PER_LATENT, MEL_PER_LATENT, Shown

WINDOW = 8  # video frames
STEP = 2  # video frames between two windows
# Rows and columns of a 128x128 picture: over 21,600 frames of `data/motion.py` the box of all that a mouth can change lay within rows 66 to 101
# and columns 38 to 88.
MOUTH = (slice(64, 104), slice(36, 92))
DIM = 96  # of an embedding
_MEL_PER_FRAME = MEL_PER_LATENT // FRAMES_PER_LATENT
_FRAME_DIM = 48


class LipSyncReward(nnx.Module):
    """How much better the lips go with their own sound than with that of other moments, calibrated."""

    def __init__(self, mels: int, *, rngs: nnx.Rngs):
        """mels: bands of the log-mel spectrum."""
        height, width = MOUTH[0].stop - MOUTH[0].start, MOUTH[1].stop - MOUTH[1].start
        self.frame = Trunk(height, width, 3, 4, (24, 48, 64), _FRAME_DIM, rngs=rngs)
        self.lips = nnx.Sequential(
            nnx.Linear(WINDOW * _FRAME_DIM, 192, rngs=rngs), jax.nn.gelu, nnx.Linear(192, DIM, rngs=rngs)
        )
        self.hear = nnx.Conv(mels, 48, (5,), strides=2, rngs=rngs)
        self.sound = nnx.Sequential(
            nnx.Linear(WINDOW * _MEL_PER_FRAME // 2 * 48, 192, rngs=rngs), jax.nn.gelu, nnx.Linear(192, DIM, rngs=rngs)
        )
        self.calibration = Calibration()

    def embed_lips(self, video: Float[Array, "b t 128 128 3"]) -> Float[Array, "b w d"]:
        """Windows of `WINDOW` frames, `STEP` apart, each as a vector of unit length."""
        return self.embed_mouths(video[:, :, *MOUTH])

    def embed_mouths(self, mouths: Float[Array, "b t h w 3"]) -> Float[Array, "b w d"]:
        """The same for pictures cut to `MOUTH`."""
        b, t = mouths.shape[:2]
        frames = self.frame(mouths.reshape(b * t, *mouths.shape[2:])).reshape(b, t, -1)
        return unit(self.lips(_windows(jax.nn.gelu(frames), WINDOW, STEP)))

    def embed_sound(self, mel: Float[Array, "b f 16 k"]) -> Float[Array, "b w d"]:
        """The sound of the same windows."""
        b, f, _, mels = mel.shape
        windows = _windows(mel.reshape(b, f * MEL_PER_LATENT, mels), WINDOW * _MEL_PER_FRAME, STEP * _MEL_PER_FRAME)
        w = windows.shape[1]
        heard = jax.nn.gelu(self.hear(windows.reshape(b * w, WINDOW * _MEL_PER_FRAME, mels)))
        return unit(self.sound(heard.reshape(b, w, -1)))

    def raw(self, shown: Shown) -> Float[Array, " b"]:
        """The score before calibration.

        Raises:
          ValueError: the clip is too short to compare its moments with each other.
        """
        needed = WINDOW + 2 * STEP
        if shown.video.shape[1] < needed:
            raise ValueError(f"lip sync of {shown.video.shape[1]} video frames: it takes at least {needed}, score more latent frames")
        return confidence(self.embed_lips(shown.video), self.embed_sound(shown.mel))

    def __call__(self, shown: Shown) -> Float[Array, " b"]:
        return self.calibration(self.raw(shown))


def confidence(lips: Float[Array, "b w d"], sound: Float[Array, "b w d"]) -> Float[Array, " b"]:
    """Mean cosine of windows of one place minus that of windows of different places."""
    cosine = jnp.einsum("bwd,bvd->bwv", lips, sound)
    w = cosine.shape[-1]
    own = jnp.einsum("bww->b", cosine)
    return own / w - (cosine.sum(axis=(1, 2)) - own) / (w * (w - 1))


def _windows(x: Float[Array, "b t ..."], length: int, step: int) -> Float[Array, "b w d"]:
    """Overlapping stretches of a sequence, each flattened."""
    b, t = x.shape[:2]
    index = jnp.arange(0, t - length + 1, step)[:, None] + jnp.arange(length)
    return x[:, index].reshape(b, index.shape[0], -1)
