"""A preset small enough for equality tests in float32, and parameters with nothing left at zero."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from pikastream_jax.config import AudioConfig, Config, DiTConfig, FlashVAEConfig, StreamConfig, TextConfig
from pikastream_jax.flash_vae.latents import LatentStatistics
from pikastream_jax.nn.layers import Params
from pikastream_jax.streaming.step import ModelParams, Models


def small_config(**stream) -> Config:
    """48x32 pixels, stride 8: 6x4 latents, 3x2 tokens."""
    return Config(
        name="small",
        audio=AudioConfig(mels=16, mel_frames=16, tokens=4, dim=24, blocks=1, heads=2),
        text=TextConfig(length=6, vocabulary=64, dim=24, blocks=1, heads=2),
        flash_vae=FlashVAEConfig(
            latent_channels=4,
            spatial_stride=8,
            encoder_dim=24,
            encoder_blocks=2,
            encoder_heads=2,
            encoder_kv_heads=1,
            decoder_dim=48,
            decoder_blocks=2,
            decoder_heads=4,
            decoder_kv_heads=2,
            refine_dim=24,
            refine_blocks=2,
            refine_heads=2,
            refine_window=2,
            head_hidden=16,
        ),
        dit=DiTConfig(dim=48, heads=2, blocks=2, mlp_dim=64, latent_channels=4, frequency_dim=32, text_dim=24, audio_dim=24),
        stream=StreamConfig(**({"height": 48, "width": 32, "chunk": 2, "window": 4, "steps": 2} | stream)),
    )


def copied(tree):
    """A copy of every leaf in memory of its own: an update may take it."""
    return jax.tree.map(jnp.array, tree)


def randomised(abstract: Params, seed: int) -> Params:
    """Every parameter drawn anew, gates and zero-initialised heads included; scales stay near 1 to keep signals alive."""

    def draw(path, leaf):
        # NumPy draws what JAX would compile a program for, shape by shape.
        rng = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
        name = str(getattr(path[-1], "key", path[-1]))
        noise = rng.normal(size=leaf.shape)
        if name == "scale":
            noise = 1.0 + 0.2 * noise
        elif name == "kernel":
            noise = noise * leaf.shape[0] ** -0.5
        else:
            noise = 0.3 * noise
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


@functools.cache
def small_models(config: Config, seed: int = 0) -> tuple[Models, ModelParams]:
    """Both models of a preset with randomised parameters."""
    models = Models.of(config)
    statistics = LatentStatistics(jnp.full(4, 0.1), jnp.full(4, 1.3))
    params = ModelParams(
        randomised(models.denoiser.abstract, seed), randomised(models.flash_vae.abstract, seed + 1), statistics
    )
    return models, params

