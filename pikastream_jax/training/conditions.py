"""What the bidirectional DiT makes of its conditions: `python -m pikastream_jax.training.conditions --denoiser RUN --clips FOLDER`.

The training loss at a few timesteps, on training and on held-out clips, with every condition and with one of them missing or
another clip's. A condition whose loss does not change when it is taken away is not used; a loss far lower on training clips than
on held-out ones has been learned by heart.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array, Float

from configs import preset
from pikastream_jax.config import Config
from pikastream_jax.diffusion.flow import interpolate
from pikastream_jax.dit import Denoiser
from pikastream_jax.nn.layers import Params, functional
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.dit_data import (
    ClipWindows,
    DiTBatch,
    clip_constants,
    prepare_batch,
    weighted_velocity_loss,
    windows,
    without_audio,
    without_reference,
    without_text,
)
from pikastream_jax.training.sampling import bidirectional_velocity
from pikastream_jax.weights.safetensors_io import restore_into

TIMESTEPS = (1.0, 0.85, 0.65, 0.4)
LATENT_FRAMES = 3


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure how much of the loss each condition takes away."""

    denoiser: Path
    """Run folder or .safetensors of the DiT."""
    clips: Path
    """Folder of clips."""
    batch: int = 24
    """Clips of each split."""
    config: str = "tiny"
    """Preset in configs/."""


def _others_text(batch: DiTBatch) -> DiTBatch:
    return dataclasses.replace(batch, tokens=jnp.roll(batch.tokens, 1, 0), valid=jnp.roll(batch.valid, 1, 0))


VARIANTS = {
    "all": lambda batch: batch,
    "no text": without_text,
    "other's text": _others_text,
    "no audio": without_audio,
    "no reference": without_reference,
}


def measure(config: Config, params: Params, data: dict[str, Any], clips: dict[str, ClipWindows]) -> dict[str, dict[float, dict[str, float]]]:
    """Loss by split, timestep and variant. The noise is the same in every variant.

    Args:
      data: see `prepare_batch`.
      clips: windows of each split.
    """
    model = functional(lambda rngs: Denoiser(config, rngs=rngs))

    @jax.jit
    def loss(params: Params, given: DiTBatch, t: Float[Array, ""]) -> Float[Array, ""]:
        noise = jax.random.normal(jax.random.key(1), given.latents.shape)
        times = jnp.full(given.latents.shape[:2], t)
        distance = jnp.full(len(times), float(config.stream.reference_distance))
        velocity = bidirectional_velocity(model, params, given, interpolate(given.latents, noise, times), times, distance)
        return weighted_velocity_loss(velocity, noise - given.latents, given.weight)

    result: dict[str, dict[float, dict[str, float]]] = {}
    prepare = jax.jit(functools.partial(prepare_batch, config, train=False))
    for split, batch in clips.items():
        prepared = prepare(data, batch, jax.random.key(0))
        given = {name: variant(prepared) for name, variant in VARIANTS.items()}
        result[split] = {t: {name: float(loss(params, rows, t)) for name, rows in given.items()} for t in TIMESTEPS}
    return result


def main() -> None:
    arguments = tyro.cli(Arguments)
    config = preset(arguments.config)
    model = functional(lambda rngs: Denoiser(config, rngs=rngs))
    params = restore_into(model.abstract, load_weights(arguments.denoiser, "denoiser"))
    clips = {split: windows(config, arguments.clips, split, arguments.batch, LATENT_FRAMES, None)[0] for split in ("train", "held_out")}
    result = measure(config, params, clip_constants(arguments.clips), clips)
    print(f"{'clips':9} {'t':>5} " + " ".join(f"{name:>12}" for name in VARIANTS))
    for split, rows in result.items():
        for t, row in rows.items():
            print(f"{split:9} {t:5.2f} " + " ".join(f"{value:12.4f}" for value in row.values()))


if __name__ == "__main__":
    main()
