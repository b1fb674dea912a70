"""Latents as the DiT sees them: zero mean and unit variance per channel, by statistics stored with the weights."""

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of every latent channel over the training data."""

    mean: Float[Array, "z"]
    std: Float[Array, "z"]

    def normalise(self, latents: Float[Array, "*b z"]) -> Float[Array, "*b z"]:
        return (latents - self.mean) / self.std

    def restore(self, latents: Float[Array, "*b z"]) -> Float[Array, "*b z"]:
        return latents * self.std + self.mean
