"""How much is wrong with the pictures themselves: blur, blocks, tint, noise, ghosts, warps, grids, flicker.

A regression of the strength of known damage (`training/damage.py`), as no-reference quality models are trained on synthetic distortions
(RankIQA, Liu et al. 2017, https://arxiv.org/abs/1707.08347). It sees a frame, the frame before it (flicker, ghosts) and the reference (tint).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.rewards.network import Calibration, Halve
from pikastream_jax.rewards.shown import SIDE, Shown

_CHANNELS = (48, 64, 96)
_GAIN = 4.0  # of the change between frames


class ArtifactReward(nnx.Module):
    """Minus the strength of damage, mean over every second frame, calibrated."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.patch = nnx.Conv(9, _CHANNELS[0], (8, 8), strides=4, rngs=rngs)
        self.halves = nnx.List([Halve(a, b, rngs=rngs) for a, b in zip(_CHANNELS[:-1], _CHANNELS[1:], strict=True)])
        self.up = nnx.Linear(2 * _CHANNELS[-1], 96, rngs=rngs)
        self.head = nnx.Linear(96, 1, rngs=rngs)
        self.calibration = Calibration()

    def strength(
        self, before: Float[Array, "n 128 128 3"], frame: Float[Array, "n 128 128 3"], reference: Float[Array, "n 128 128 3"]
    ) -> Float[Array, " n"]:
        """How strongly each frame is damaged, 0 not at all, 1 as strongly as in training."""
        x = jax.nn.gelu(self.patch(jnp.concatenate([frame, _GAIN * (frame - before), frame - reference], axis=-1)))
        for half in self.halves:
            x = half(x)
        # Damage may be everywhere or in one place: the mean and the spread over the picture, both smooth.
        mean = x.mean(axis=(1, 2))
        spread = jnp.sqrt(jnp.mean((x - mean[:, None, None]) ** 2, axis=(1, 2)) + 1e-4)
        return self.head(jax.nn.gelu(self.up(jnp.concatenate([mean, spread], axis=-1))))[:, 0]

    def raw(self, shown: Shown) -> Float[Array, " b"]:
        """Minus the mean strength, before calibration."""
        b, t = shown.video.shape[:2]
        before, frame = (shown.video[:, first::2].reshape(-1, SIDE, SIDE, 3) for first in (0, 1))
        reference = jnp.repeat(shown.reference, t // 2, axis=0)
        return -self.strength(before, frame, reference).reshape(b, t // 2).mean(axis=-1)

    def __call__(self, shown: Shown) -> Float[Array, " b"]:
        return self.calibration(self.raw(shown))
