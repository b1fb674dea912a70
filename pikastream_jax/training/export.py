"""Packs trained runs into the one file that streams: `python -m pikastream_jax.training.export --flash-vae ... --denoiser ...`."""

import dataclasses
import json
from pathlib import Path

import tyro

from configs import preset
from pikastream_jax.streaming.package import SHIPPED, save_package
from pikastream_jax.streaming.step import ModelParams, Models
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.clips import load_clip_record
from pikastream_jax.training.metrics import METRICS_FILE, read_rows
from pikastream_jax.weights.safetensors_io import restore_into


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write the weights of a stream to one file."""

    flash_vae: Path
    """Run folder or .safetensors of FlashVAE."""
    denoiser: Path
    """Run folder or .safetensors of the student."""
    clips: Path
    """The clips it was trained on: vocabulary and latent statistics."""
    out: Path = SHIPPED
    """File to write."""
    config: str = "tiny"
    """Preset in configs/."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    config = preset(arguments.config)
    models = Models.of(config)
    tokenizer, statistics = load_clip_record(arguments.clips, config.text.length)
    params = ModelParams(
        restore_into(models.denoiser.abstract, load_weights(arguments.denoiser)),
        restore_into(models.flash_vae.abstract, load_weights(arguments.flash_vae)),
        statistics,
    )
    made = {name: _history(getattr(arguments, name)) for name in ("flash_vae", "denoiser")}
    save_package(arguments.out, config, params, tokenizer, made)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")


def _history(run: Path) -> dict:
    """Stage, seed and last held-out figures of a run folder."""
    if not run.is_dir():
        return {"file": run.name}
    record = json.loads((run / "config.json").read_text())
    held_out = [row for row in read_rows(run / METRICS_FILE) if row["kind"] == "held_out"]
    return {"stage": record["stage"], "seed": record["seed"], "held_out": held_out[-1] if held_out else None}


if __name__ == "__main__":
    main()
