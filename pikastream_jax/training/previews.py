"""What generated latents look like: truth above generated, a few frames of each clip."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pikastream_jax.config import Config
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.nn.layers import functional
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
    model = functional(lambda rngs: FlashVAE(config.flash_vae, rngs=rngs))
    params = restore_into(model.abstract, load_weights(init["flash_vae"], "flash_vae"))
    _, statistics = load_clip_record(init["clips"], config.text.length)
    decode = jax.jit(lambda params, latents: model.bind(params).decode(statistics.restore(latents)))
    rows = []
    for pair in zip(truth, generated, strict=True):
        rows += [np.asarray(decode(params, jnp.asarray(latents)[None]))[0, 2::4] for latents in pair]
    save_rows(path, rows)
