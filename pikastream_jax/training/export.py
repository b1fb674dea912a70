"""Packs trained runs into the one file that streams: `python -m pikastream_jax.training.export --config nano`.

By default the student that went farthest in the recipe, with FlashVAE and the clips' vocabulary and latent statistics from the same folder of runs.
"""

import dataclasses
import json
import sys
from pathlib import Path

import tyro

from configs import preset
from pikastream_jax.streaming.package import save_package
from pikastream_jax.streaming.step import ModelParams, Models
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.clips import load_clip_record
from pikastream_jax.training.metrics import METRICS_FILE, read_rows
from pikastream_jax.training.records import read_record
from pikastream_jax.training.stages import FLASH_VAE, STUDENTS, best_run
from pikastream_jax.weights.safetensors_io import restore_into


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write the weights of a stream to one file."""

    config: str = "tiny"
    """Preset in configs/."""
    denoiser: Path | None = None
    """Run folder or .safetensors of the student; by default of the last of the student's stages that has a run in runs/CONFIG."""
    flash_vae: Path | None = None
    """Run folder or .safetensors of FlashVAE; by default runs/CONFIG/vae_adversarial, or else runs/CONFIG/vae_streaming."""
    clips: Path | None = None
    """The clips it was trained on: vocabulary and latent statistics; by default runs/CONFIG/clips."""
    out: Path | None = None
    """File to write; by default runs/CONFIG/CONFIG.safetensors. What ships is pikastream_jax/assets/tiny.safetensors."""
    root: Path = Path("runs")
    """Folder of the presets' runs."""


def export(arguments: Arguments) -> Path:
    """Writes the file.

    Raises:
      FileNotFoundError: a run or the clips are missing.
      ValueError: weights that do not fit the preset, or clips of another one.
    """
    config, folder = preset(arguments.config), arguments.root / arguments.config
    denoiser = arguments.denoiser or best_run(folder, STUDENTS, "--denoiser")
    flash_vae = arguments.flash_vae or best_run(folder, FLASH_VAE, "--flash-vae")
    clips = arguments.clips or folder / "clips"
    made_for = read_record(clips)["made_with"]["config"]
    if made_for != config.name:
        raise ValueError(f"{clips} holds clips of preset {made_for}, the weights are of {config.name}: give the clips that they were trained on")
    models = Models.of(config)
    tokenizer, statistics = load_clip_record(clips, config.text.length)
    params = ModelParams(
        restore_into(models.denoiser.abstract, load_weights(denoiser, "denoiser")),
        restore_into(models.flash_vae.abstract, load_weights(flash_vae, "flash_vae")),
        statistics,
    )
    out = arguments.out or folder / f"{config.name}.safetensors"
    save_package(out, config, params, tokenizer, {"flash_vae": _history(flash_vae), "denoiser": _history(denoiser)})
    return out


def main() -> int:
    try:
        arguments = tyro.cli(Arguments)
        out = export(arguments)
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


def _history(run: Path) -> dict:
    """Stage, seed and last held-out figures of a run folder."""
    if not run.is_dir():
        return {"file": run.name}
    record = json.loads((run / "config.json").read_text())
    held_out = [row for row in read_rows(run / METRICS_FILE) if row["kind"] == "held_out"]
    return {"stage": record["stage"], "seed": record["seed"], "held_out": held_out[-1] if held_out else None}


if __name__ == "__main__":
    sys.exit(main())
