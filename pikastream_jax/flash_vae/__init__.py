"""FlashVAE: an all-Transformer video VAE whose decoder takes one latent frame at a time."""

from pikastream_jax.flash_vae.model import FlashVAE
from pikastream_jax.flash_vae.transformer import KVCache

__all__ = ["FlashVAE", "KVCache"]
