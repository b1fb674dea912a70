"""Latents as the DiT sees them: zero mean and unit variance per channel, by statistics stored with the weights."""

import dataclasses

import jax
import jax.numpy as jnp
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


def measure_statistics(latents: Float[Array, "n z"]) -> LatentStatistics:
    """Statistics of a sample of latents; a dead channel gets a standard deviation of 1."""
    std = jnp.std(latents, axis=0)
    return LatentStatistics(jnp.mean(latents, axis=0), jnp.where(std > 1e-6, std, 1.0))
