"""What generated latents look like: truth above generated, a few frames of each clip."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.flash_vae.latents import LatentStatistics
from pikastream_jax.nn.layers import Params, functional
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.clips import load_clip_record
from pikastream_jax.training.pictures import save_rows
from pikastream_jax.weights.safetensors_io import restore_into


def save_preview(
    config: Config,
    init: dict[str, Path],
    path: Path,
    truth: Float[np.ndarray, "b f r c z"],
    generated: Float[np.ndarray, "b f r c z"],
) -> None:
    """Decodes normalised latents with `init["flash_vae"]` and writes one picture, two rows to a clip."""
    decode, params, statistics = _decoder(config, init["flash_vae"], init["clips"])
    rows = []
    for pair in zip(truth, generated, strict=True):
        rows += [np.asarray(decode(params, statistics, jnp.asarray(latents)[None]))[0, 2::4] for latents in pair]
    save_rows(path, rows)


@functools.lru_cache(maxsize=1)  # of the stage that runs; traced and read once, not for every picture
def _decoder(config: Config, flash_vae: Path, clips: Path) -> tuple[Callable[..., Array], Params, LatentStatistics]:
    model = functional(lambda rngs: FlashVAE(config.flash_vae, rngs=rngs))
    params = restore_into(model.abstract, load_weights(flash_vae, "flash_vae"))
    _, statistics = load_clip_record(clips, config.text.length)

    @jax.jit
    def decode(params: Params, statistics: LatentStatistics, latents: Array) -> Array:
        return model.bind(params).decode(statistics.restore(latents))

    return decode, params, statistics
