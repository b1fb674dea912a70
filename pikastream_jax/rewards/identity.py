"""Is this the person of the reference? A siamese network: the same embedding of both pictures, compared by their cosine.

The form of face recognisers used as rewards and losses for talking heads (ArcFace, Deng et al. 2019, https://arxiv.org/abs/1801.07698),
trained by `training/reward_identity.py` on drawn people.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.rewards.network import Calibration, Trunk, halved, unit
from pikastream_jax.rewards.shown import FRAMES_PER_LATENT, Shown

DIM = 96  # of an embedding
_FACE = (slice(36, 100), slice(32, 96))  # rows and columns of a 128x128 picture that hold eyes, nose and mouth


class IdentityReward(nnx.Module):
    """Mean cosine between the reference and one frame in four, calibrated."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.whole = Trunk(64, 64, 3, 4, (32, 64, 96), 128, rngs=rngs)  # at half the size: hair, shape of the head, clothes
        self.face = Trunk(64, 64, 3, 2, (24, 48, 64, 96), 128, rngs=rngs)
        self.mix = nnx.Linear(256, DIM, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(DIM))  # what each feature is worth in the comparison
        self.calibration = Calibration()

    def features(self, pictures: Float[Array, "n 128 128 3"]) -> Float[Array, "n d"]:
        """What the embedding is made of; training makes the first of them parameters of the face, each of unit variance over people."""
        both = jnp.concatenate([self.whole(halved(pictures)), self.face(pictures[:, *_FACE])], axis=-1)
        return self.mix(jax.nn.gelu(both))

    def embed(self, pictures: Float[Array, "n 128 128 3"]) -> Float[Array, "n d"]:
        """Who is in each picture, as a vector of unit length."""
        return self.compared(self.features(pictures))

    def compared(self, features: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Features weighted by what they are worth, at unit length."""
        return unit(self.gain[...] * features)

    def raw(self, shown: Shown) -> Float[Array, " b"]:
        """Mean cosine, before calibration."""
        frames = shown.video[:, FRAMES_PER_LATENT // 2 :: FRAMES_PER_LATENT]  # who it is changes slowly, if at all
        b, t = frames.shape[:2]
        seen = self.embed(frames.reshape(b * t, *frames.shape[2:])).reshape(b, t, -1)
        return jnp.einsum("btd,bd->b", seen, self.embed(shown.reference)) / t

    def __call__(self, shown: Shown) -> Float[Array, " b"]:
        return self.calibration(self.raw(shown))
