"""Does it move like somebody who talks? A classifier of true motion against motion that is reversed, shuffled, frozen, shaky or generated.

It sees the middle of the picture at half its size, as colours and as change from frame to frame, and says something about every frame; the score is the
mean. So clips of any length are judged, and a stretch that is wrong costs its share.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.rewards.network import Calibration, Trunk, halved
from pikastream_jax.rewards.shown import Shown

HEAD = (slice(16, 112), slice(20, 108))  # rows and columns of a 128x128 picture that hold the head in all its motions
_GAIN = 4.0  # of the change: from one frame to the next a pixel changes by a few hundredths
_DIM = 96
_DILATIONS = (1, 2, 4)


class MotionReward(nnx.Module):
    """The logit of "this moves as true clips do", mean over the frames, calibrated."""

    def __init__(self, *, rngs: nnx.Rngs):
        height, width = HEAD[0].stop - HEAD[0].start, HEAD[1].stop - HEAD[1].start
        self.frame = Trunk(height // 2, width // 2, 6, 4, (40, 64, 96), _DIM, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(_DIM, rngs=rngs) for _ in _DILATIONS])
        self.times = nnx.List([nnx.Conv(_DIM, _DIM, (5,), kernel_dilation=d, rngs=rngs) for d in _DILATIONS])
        self.norm_out = nnx.LayerNorm(_DIM, rngs=rngs)
        self.head = nnx.Linear(_DIM, 1, rngs=rngs)
        self.calibration = Calibration()

    def logits(self, video: Float[Array, "b t 128 128 3"]) -> Float[Array, "b s"]:
        """What each frame but the first says, from itself and the frames around it."""
        return self.logits_of_heads(halved(video[:, :, *HEAD]))

    def logits_of_heads(self, heads: Float[Array, "b t h w 3"]) -> Float[Array, "b s"]:
        """The same for pictures cut to `HEAD` and `halved`."""
        change = _GAIN * (heads[:, 1:] - heads[:, :-1])
        seen = jnp.concatenate([heads[:, 1:], change], axis=-1)
        b, s = seen.shape[:2]
        x = self.frame(seen.reshape(b * s, *seen.shape[2:])).reshape(b, s, -1)
        for norm, time in zip(self.norms, self.times, strict=True):
            x = x + jax.nn.gelu(time(norm(x)))
        return self.head(self.norm_out(x))[..., 0]

    def raw(self, shown: Shown) -> Float[Array, " b"]:
        """The mean logit, before calibration."""
        return self.logits(shown.video).mean(axis=-1)

    def __call__(self, shown: Shown) -> Float[Array, " b"]:
        return self.calibration(self.raw(shown))
