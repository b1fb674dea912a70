"""FlashVAE's stages without the renderer, which takes long to compile, and with one block of each kind."""

import dataclasses

import jax
import jax.numpy as jnp

from pikastream_jax.training.faces import FaceBatch
from tests.small import small_config


def one_block_config():
    """32x32 pixels."""
    config = small_config(height=32, width=32)
    blocks = {"encoder_blocks": 1, "decoder_blocks": 1, "refine_blocks": 1}
    return dataclasses.replace(config, flash_vae=dataclasses.replace(config.flash_vae, **blocks))


def noise_for_faces(key, settings, config):
    """In place of `draw_faces`."""
    frames = settings.latent_frames * config.flash_vae.temporal_stride
    video = jax.random.uniform(key, (settings.batch, frames, settings.crop, settings.crop, 3), minval=-1.0)
    return FaceBatch(video, jnp.full((settings.batch, frames, 2, 4), 8.0), jnp.zeros((settings.batch, 2)))
