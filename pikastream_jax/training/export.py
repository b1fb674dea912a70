"""Packs trained runs into the one file that streams: `python -m pikastream_jax.training.export --config nano`.

By default the student that went farthest in the recipe, with FlashVAE and the clips' vocabulary and latent statistics from the same folder of runs.
The file streams in the schedule that the student was trained for and in its steps, or in those of `--steps`.

Several students that come from one another may be packed as their weighted mean: what one stage unlearns of another's gains comes back in part
(Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", https://arxiv.org/abs/2109.01903).
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from configs import preset
from pikastream_jax.config import Config
from pikastream_jax.nn.layers import Params
from pikastream_jax.streaming.package import OWN, save_package
from pikastream_jax.streaming.step import ModelParams, Models
from pikastream_jax.training.checkpoint import load_weights, updates_done
from pikastream_jax.training.clips import load_clip_record
from pikastream_jax.training.metrics import METRICS_FILE, read_rows
from pikastream_jax.training.records import read_record
from pikastream_jax.training.stages import FLASH_VAE, STUDENTS, as_trained, best_run
from pikastream_jax.weights.safetensors_io import load, restore_into


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write the weights of a stream to one file."""

    config: str = "tiny"
    """Preset in configs/."""
    denoiser: tuple[Path, ...] = ()
    """Run folder or .safetensors of the student; by default of the last of the student's stages that has a run in runs/CONFIG. Of several the mean."""
    shares: tuple[float, ...] = ()
    """Of each student in the mean, together 1; by default equal ones."""
    flash_vae: Path | None = None
    """Run folder or .safetensors of FlashVAE; by default runs/CONFIG/vae_adversarial, or else runs/CONFIG/vae_streaming."""
    clips: Path | None = None
    """The clips it was trained on: vocabulary and latent statistics; by default runs/CONFIG/clips."""
    steps: int | None = None
    """Denoising steps in which the file is to stream; by default those that a run was trained in, and a file that streams its own."""
    out: Path | None = None
    """File to write; by default runs/CONFIG/CONFIG.safetensors. What ships is pikastream_jax/assets/tiny.safetensors."""
    root: Path = Path("runs")
    """Folder of the presets' runs."""


def export(arguments: Arguments) -> Path:
    """Writes the file.

    Raises:
      FileNotFoundError: a run or the clips are missing.
      ValueError: weights that do not fit the preset, clips of another one, or students that make no mean: their shares, schedules or steps.
    """
    config, folder = preset(arguments.config), arguments.root / arguments.config
    denoisers = arguments.denoiser or (best_run(folder, STUDENTS, "--denoiser"),)
    config = preset(config.name, **_way(config, denoisers, arguments.steps))
    shares = _shares(arguments.shares, len(denoisers))
    flash_vae = arguments.flash_vae or best_run(folder, FLASH_VAE, "--flash-vae")
    clips = arguments.clips or folder / "clips"
    made_for = read_record(clips)["made_with"]["config"]
    if made_for != config.name:
        raise ValueError(f"{clips} holds clips of preset {made_for}, the weights are of {config.name}: give the clips that they were trained on")
    models = Models.of(config)
    tokenizer, statistics = load_clip_record(clips, config.text.length)
    params = ModelParams(
        _mean([restore_into(models.denoiser.abstract, load_weights(path, "denoiser")) for path in denoisers], shares),
        restore_into(models.flash_vae.abstract, load_weights(flash_vae, "flash_vae")),
        statistics,
    )
    out = arguments.out or folder / f"{config.name}.safetensors"
    made = [_history(path, "denoiser") for path in denoisers]
    mean = {"mean of": [{"share": share, "made": one} for share, one in zip(shares, made, strict=True)]}
    save_package(out, config, params, tokenizer, {"flash_vae": _history(flash_vae, "flash_vae"), "denoiser": mean if len(made) > 1 else made[0]})
    return out


def _shares(shares: tuple[float, ...], count: int) -> tuple[float, ...]:
    if not shares:
        return (1 / count,) * count
    if len(shares) != count:
        raise ValueError(f"--shares has {len(shares)} numbers for {count} students of --denoiser: give one each")
    if not (min(shares) > 0 and math.isclose(sum(shares), 1.0, abs_tol=1e-6)):
        raise ValueError(f"--shares {' '.join(map(str, shares))} must be above 0 and make 1 together")
    return shares


def _way(config: Config, students: tuple[Path, ...], steps: int | None) -> dict[str, Any]:
    """How the file is to stream: the fields `OWN`, which must be the same for all students but for what is given."""
    given = {} if steps is None else {"steps": steps}
    ways = [_own(config, path) | given for path in students]
    for name in OWN:
        if len(values := {way[name] for way in ways}) > 1:
            fix = "give --steps" if name == "steps" else "they make no mean"
            raise ValueError(f"--denoiser names students that stream in {name} {' and '.join(map(str, sorted(values)))}: {fix}")
    return ways[0]


def _own(config: Config, path: Path) -> dict[str, Any]:
    if path.is_dir():
        stream = dataclasses.asdict(as_trained(config, json.loads((path / "config.json").read_text())).stream)
    else:
        packed = load(path)[1].get("pikastream")
        stream = dataclasses.asdict(config.stream) | (json.loads(packed)["config"]["stream"] if packed else {})
    return {name: stream[name] for name in OWN}


def _mean(students: list[Params], shares: tuple[float, ...]) -> Params:
    return jax.tree.map(lambda *leaves: sum(share * jnp.asarray(leaf, jnp.float32) for share, leaf in zip(shares, leaves, strict=True)), *students)


def main() -> int:
    try:
        arguments = tyro.cli(Arguments)
        out = export(arguments)
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


def _history(run: Path, part: str) -> dict:
    """Stage, seed and last held-out figures of a run folder; of a file that streams what stands there of that part."""
    if not run.is_dir():
        told = json.loads(load(run)[1].get("pikastream", "{}"))
        return told.get("made", {}).get(part, {"file": run.name})
    record, done = json.loads((run / "config.json").read_text()), updates_done(run)
    held_out = [row for row in read_rows(run / METRICS_FILE) if row["kind"] == "held_out" and row["step"] <= done]
    return {"stage": record["stage"], "seed": record["seed"], "held_out": held_out[-1] if held_out else None}


if __name__ == "__main__":
    sys.exit(main())
