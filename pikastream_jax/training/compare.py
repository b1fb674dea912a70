"""Runs compared on held-out clips, pair by pair: `python -m pikastream_jax.training.compare --config nano --runs dit_sft dit_reward`.

Every run makes the same clips from the same noise (`training/judge.py`); tables give for each measure the mean difference from the first run
and its standard error. A teacher's run may be sampled in several numbers of steps, `--runs dit_pretrain@4 dit_pretrain@50`, and `truth` stands for
the held-out clips themselves, passed through FlashVAE. What was judged is kept in `runs/CONFIG/judged/` and not judged again while nothing has changed.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float
from tqdm import tqdm

from configs import preset
from pikastream_jax.config import Config
from pikastream_jax.data.corpus import load_corpus
from pikastream_jax.diffusion.flow import interpolate
from pikastream_jax.measuring.calibration import calibrate
from pikastream_jax.measuring.estimator import Estimator
from pikastream_jax.measuring.paired import compared, mean_and_error, table
from pikastream_jax.nn.layers import Params
from pikastream_jax.rewards import REWARDS
from pikastream_jax.streaming.package import load_package
from pikastream_jax.streaming.step import ModelParams, Models
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.clips import SPEECH, digest, load_clip_record
from pikastream_jax.training.dit_data import DiTBatch
from pikastream_jax.training.judge import (
    HeldOut,
    Judge,
    Plan,
    Sampler,
    directions,
    student_sampler,
    teacher_sampler,
    true_sampler,
)
from pikastream_jax.training.records import read_record
from pikastream_jax.training.refl import load_rewards
from pikastream_jax.training.sampling import Guidance, bidirectional_velocity
from pikastream_jax.training.stages import FLASH_VAE, TEACHERS, as_trained, best_run
from pikastream_jax.weights.safetensors_io import restore_into

TRUTH = "truth"
_CALIBRATION_PEOPLE = 24
_TIMES = (1.0, 0.85, 0.65, 0.4)  # timesteps at which the distance of two teachers is taken


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare runs on held-out clips."""

    runs: tuple[str, ...]
    """Folders in runs/CONFIG (or paths), each compared with the first; a file that streams; truth for the clips themselves. NAME@STEPS for one in so many steps; students take else those they were trained in, files their own."""
    config: str = "tiny"
    """Preset in configs/."""
    clips: int = 200
    """Held-out clips that each makes."""
    latent_frames: int = 9
    """Length of a clip."""
    steps: int = 50
    """Steps of teachers that name none."""
    guidance: Guidance = Guidance()
    """Of teachers."""
    seed: int = 0
    """Of the noise that all start from."""
    distance: bool = False
    """Also the mean squared difference of two teachers' velocities on noisy held-out clips."""
    speech: Path = SPEECH
    """Speech features that the clips were made with."""
    root: Path = Path("runs")
    """Folder of the presets' runs."""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("--runs names no run: give at least one")
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to make the clips."""

    name: str
    models: Models
    params: Params
    sampler: Sampler
    teacher: bool
    way: dict[str, Any]  # JSON: all that its clips follow from, beside the plan and the judge


def contestant(name: str, config: Config, folder: Path, steps: int, guidance: Guidance) -> Contestant:
    """A run or a file that streams by its name, `NAME@STEPS` for so many steps, or `truth`.

    Args:
      folder: of the preset's runs.

    Raises:
      ValueError: no such run, one of another stage or preset, or steps that it cannot be sampled in.
    """
    if name == TRUTH:
        return Contestant(name, Models.of(config), {}, true_sampler, False, {})
    run, separator, asked = name.partition("@")
    if separator and not (asked.isdigit() and int(asked) > 0):
        raise ValueError(f"run {name!r}: {asked!r} is no number of steps, write for example {run}@8")
    path = folder / run if (folder / run).exists() else Path(run)
    other = {"steps": int(asked)} if asked else {}
    if path.is_file():
        return _packed(name, path, config, folder, other)
    if not (path / "config.json").is_file():
        there = sorted(entry.parent.name for entry in folder.glob("dit_*/config.json"))
        raise ValueError(f"no run {run!r} in {folder}: {'there are ' + ', '.join(there) if there else 'it has none of the DiT'}")
    record = json.loads((path / "config.json").read_text())
    stage = record["stage"]
    if not stage.startswith("dit_"):
        raise ValueError(f"{path} is a run of {stage}, which makes no clips: name one of the DiT's stages")
    teacher = stage in TEACHERS
    models, sampler = _sampler(config if teacher else as_trained(config, record, **other), int(asked or steps) if teacher else None, guidance)
    params = restore_into(models.denoiser.abstract, load_weights(path, "denoiser"))
    way = {"weights": digest(*jax.tree.leaves(params))}
    if teacher:
        way |= {"steps": int(asked or steps), "guidance": dataclasses.asdict(guidance)}
        way |= {name: getattr(models.config.stream, name) for name in ("shift", "reference_distance")}
    else:
        way["stream"] = dataclasses.asdict(models.config.stream)
    return Contestant(name, models, params, sampler, teacher, way)


def _packed(name: str, path: Path, config: Config, folder: Path, other: dict[str, int]) -> Contestant:
    """The student in a file that streams, in its own way but for `other`. Its latents must be scaled as those of the clips."""
    package = load_package(path, **other)
    if package.config.name != config.name:
        raise ValueError(f"{path} is of preset {package.config.name}: give --config {package.config.name}")
    _, statistics = load_clip_record(folder / "clips", config.text.length)
    packed = package.params.statistics
    for field in ("mean", "std"):
        if not np.allclose(getattr(packed, field), getattr(statistics, field), rtol=2**-8, atol=1e-3):  # the file is bfloat16
            raise ValueError(f"{path} and {folder / 'clips'} scale latents differently: make clips with --like {path}")
    models, sampler = _sampler(package.config, None, Guidance())
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), package.params.denoiser)
    way = {"weights": digest(*jax.tree.leaves(params)), "stream": dataclasses.asdict(package.config.stream)}
    return Contestant(name, models, params, sampler, False, way)


@functools.cache
def _sampler(config: Config, steps: int | None, guidance: Guidance) -> tuple[Models, Sampler]:
    """Models and sampler of a teacher, or of a student where `steps` is None; the same objects for the same way, so that it is compiled once."""
    models = Models.of(config)
    return models, student_sampler(models) if steps is None else teacher_sampler(models, steps, guidance)


def load_judge(config: Config, folder: Path) -> tuple[Judge, dict[str, Any]]:
    """The judge of a preset's runs, and what its judgements follow from.

    Raises:
      FileNotFoundError, ValueError: no FlashVAE, no clips, or ones that do not fit.
    """
    models = Models.of(config)
    _, statistics = load_clip_record(folder / "clips", config.text.length)
    flash_vae = restore_into(models.flash_vae.abstract, load_weights(best_run(folder, FLASH_VAE, "--root"), "flash_vae"))
    there = {f"reward_{name}": folder / f"reward_{name}" for name in REWARDS}
    rewards, reward_params = None, {}
    if all(path.exists() for path in there.values()):
        rewards, reward_params = load_rewards(config, there)
    estimator = Estimator()
    _, metric = calibrate(estimator, _CALIBRATION_PEOPLE, config.stream.height)
    judge = Judge(models, ModelParams({}, flash_vae, statistics), estimator, metric, rewards, reward_params)
    follows = {"flash_vae": digest(*jax.tree.leaves(flash_vae)), "estimator": digest(*jax.tree.leaves(estimator.params))}
    return judge, follows | {"rewards": digest(*jax.tree.leaves(reward_params)), "clips": read_record(folder / "clips")["made_with"]}


def judged(contestant: Contestant, judge: Judge, held_out: HeldOut, follows: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """Measures of every clip, taken from `folder` where they follow from the very same things."""
    key = json.dumps([dataclasses.asdict(held_out.plan), contestant.way, follows], sort_keys=True)
    path = folder / f"{Path(contestant.name).name}.npz"
    if path.exists():
        with np.load(path) as stored:
            if str(stored["follows_from"]) == key:
                return {name: stored[name] for name in stored.files if name != "follows_from"}
    with tqdm(total=held_out.plan.clips, desc=contestant.name, unit="clip", leave=False) as bar:
        found = judge.judge(held_out, contestant.sampler, contestant.params, bar.update)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        np.savez(file, follows_from=key, **found)
    unfinished.replace(path)  # whole or absent, whenever this is stopped
    return found


def velocity_distances(first: Contestant, second: Contestant, held_out: HeldOut) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Mean squared difference of two teachers' velocities for each held-out clip, over a few timesteps; and the first one's own mean square."""
    models = first.models
    stream = models.config.stream

    @jax.jit
    def distance(one: Params, other: Params, batch: DiTBatch, noise: Array) -> tuple[Array, Array]:
        place = jnp.full(len(noise), float(stream.reference_distance))

        def at(time):
            t = jnp.full(noise.shape[:2], time)
            x = interpolate(batch.latents, noise, t)
            a, b = (bidirectional_velocity(models.denoiser, params, batch, x, t, place) for params in (one, other))
            return jnp.mean((b - a) ** 2, axis=(1, 2, 3, 4)), jnp.mean(a**2, axis=(1, 2, 3, 4))

        return jax.tree.map(lambda leaf: leaf.mean(axis=0), jax.lax.map(at, jnp.asarray(_TIMES)))

    rows = [jax.device_get(distance(first.params, second.params, batch, noise)) for batch, noise in held_out.batches()]
    different, own = np.concatenate(rows, axis=1)[:, : held_out.plan.clips]
    return different, own


def report(names: list[str], results: list[dict[str, np.ndarray]]) -> str:
    """A table against the first run for each other, or the means of a single one."""
    better = directions(results[0])
    if len(names) == 1:
        rows = ((name, *mean_and_error(values)) for name, values in results[0].items())
        return "\n".join([names[0], *(f"{name:24} {mean:10.4f} +- {error:.4f}" for name, mean, error in rows)])
    parts = [f"{names[0]} against {name}\n{table((names[0], name), results[0], other, better)}" for name, other in zip(names[1:], results[1:], strict=True)]
    return "\n\n".join(parts)


def as_json(names: list[str], results: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Every paired difference from the first run."""
    better, found = directions(results[0]), {}
    for name, other in zip(names[1:], results[1:], strict=True):
        rows = {}
        for measure in results[0]:
            try:
                pair = compared(results[0][measure], other[measure])
            except ValueError:  # too few clips could be measured in both
                continue
            rows[measure] = dataclasses.asdict(pair) | {"standard_errors": pair.standard_errors, "verdict": pair.verdict(better[measure])}
        found[name] = rows
    return {"first": names[0], "against": found}


def main() -> int:
    try:
        arguments = tyro.cli(Arguments)
        config, folder = preset(arguments.config), arguments.root / arguments.config
        plan = Plan(arguments.clips, arguments.latent_frames, arguments.seed)
        contestants = [contestant(name, config, folder, arguments.steps, arguments.guidance) for name in arguments.runs]
        if arguments.distance and (others := [one.name for one in contestants if not one.teacher]):
            raise ValueError(f"--distance compares teachers, {', '.join(others)} is none: leave it out")
        held_out = HeldOut(config, folder / "clips", load_corpus(arguments.speech), plan)
        judge, follows = load_judge(config, folder)
        results = [judged(one, judge, held_out, follows, folder / "judged") for one in contestants]
        print(report(list(arguments.runs), results))
        if judge.rewards is None:
            print(f"no rewards: {folder} has not all of {', '.join(f'reward_{name}' for name in REWARDS)}")
        result = as_json(list(arguments.runs), results)
        for other in contestants[1:] if arguments.distance else ():
            different, own = velocity_distances(contestants[0], other, held_out)
            mean, error = mean_and_error(different)
            result["against"][other.name]["velocity_distance"] = {"mean": mean, "standard_error": error, "of": float(own.mean())}
            print(f"velocities of {arguments.runs[0]} and {other.name} differ by {mean:.5f} +- {error:.5f} in the mean square, of {own.mean():.4f}")
        if len(contestants) > 1:
            (folder / "judged" / "comparison.json").write_text(json.dumps(result, indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
