"""The diffusion Transformer: one module for the bidirectional teacher and the causal student."""

from pikastream_jax.dit.denoiser import Denoiser
from pikastream_jax.dit.model import DiT

__all__ = ["Denoiser", "DiT"]
