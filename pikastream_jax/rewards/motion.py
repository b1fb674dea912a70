"""Does it move like somebody who talks? A classifier of true motion against motion that is reversed, shuffled, frozen or shaky.

Every frame is first read: how the head stands, where the eyes look, what lids, brows and lips do, fifteen numbers that training knows from the
renderer. A network over time judges these numbers and their changes, and sees nothing else, so that it can neither learn clips by heart from what
they look like nor reward a look. It says something about every frame; the score is the mean, so clips of any length are judged.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.rewards.network import Calibration, Trunk
from pikastream_jax.rewards.shown import Shown

FACE = (slice(44, 104), slice(28, 100))  # rows and columns of a 128x128 picture that hold eyes and mouth in all motions of the head
READINGS = 15  # numbers read of a frame: the fields of the renderer's `FaceState`, each of unit variance
_GAIN = 4.0  # of changes from frame to frame
_DIM = 96
_DILATIONS = (1, 2, 4)


class MotionReward(nnx.Module):
    """The logit of "this moves as true clips do", mean over the frames, calibrated."""

    def __init__(self, *, rngs: nnx.Rngs):
        height, width = (side.stop - side.start for side in FACE)
        self.frame = Trunk(height, width, 3, 4, (32, 48, 64), 128, rngs=rngs)
        self.say = nnx.Linear(128, READINGS, rngs=rngs)
        self.rise = nnx.Linear(2 * READINGS, _DIM, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(_DIM, rngs=rngs) for _ in _DILATIONS])
        self.times = nnx.List([nnx.Conv(_DIM, _DIM, (5,), kernel_dilation=d, rngs=rngs) for d in _DILATIONS])
        self.norm_out = nnx.LayerNorm(_DIM, rngs=rngs)
        self.head = nnx.Linear(_DIM, 1, rngs=rngs)
        self.calibration = Calibration()

    def read(self, faces: Float[Array, "b t h w 3"]) -> Float[Array, "b t 15"]:
        """What the face does in each frame of pictures cut to `FACE`."""
        b, t = faces.shape[:2]
        return self.say(jax.nn.gelu(self.frame(faces.reshape(b * t, *faces.shape[2:])))).reshape(b, t, -1)

    def logits(self, readings: Float[Array, "b t 15"]) -> Float[Array, "b s"]:
        """What each frame but the first says of the motion, from the frames around it."""
        change = _GAIN * (readings[:, 1:] - readings[:, :-1])
        x = self.rise(jnp.concatenate([readings[:, 1:], change], axis=-1))
        for norm, time in zip(self.norms, self.times, strict=True):
            x = x + jax.nn.gelu(time(norm(x)))
        return self.head(self.norm_out(x))[..., 0]

    def raw(self, shown: Shown) -> Float[Array, " b"]:
        """The mean logit, before calibration."""
        return self.logits(self.read(shown.video[:, :, *FACE])).mean(axis=-1)

    def __call__(self, shown: Shown) -> Float[Array, " b"]:
        return self.calibration(self.raw(shown))
