"""A teacher's trajectories at exactly the student's timesteps: `python -m pikastream_jax.training.ode_pairs --config nano`.

Noise, what it becomes at each timestep of the student, and the clean latents at the end, under the conditions of training clips; `dit_causal`
learns to go from any of those states to the end (ODE regression: CausVid, https://arxiv.org/abs/2412.07772). The solver is Euler on a grid that
holds the student's timesteps bit for bit (`sampling.refined_timesteps`), guided for prompt, sound and reference.

Two kinds of teacher. `bidirectional`: every latent frame of a window sees every other, so an early state of a chunk may hold what only its
future explains, which a causal student cannot follow. `causal` (Causal-Forcing): the teacher is a student trained on the data at all timesteps
(`train.py dit_causal --objective data --timesteps all`), and every chunk is solved after the true latents before it, as in its training. All
chunks of a window are then solved at once, as the query copy beside the context copy.

The same command again goes on where it was stopped.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int
from tqdm import tqdm

from configs import preset
from pikastream_jax.config import Config
from pikastream_jax.diffusion.flow import interpolate, solver_timesteps
from pikastream_jax.dit import Denoiser
from pikastream_jax.nn.layers import Functional, Params, functional
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.clips import digest
from pikastream_jax.training.dit_data import ClipWindows, DiTBatch, clip_constants, prepare_batch, windows
from pikastream_jax.training.records import Plan, Record, Records, read_record, write_records
from pikastream_jax.training.sampling import Guidance, euler, guided, refined_timesteps, sample_teacher
from pikastream_jax.training.settings import arguments_of
from pikastream_jax.training.stages import TEACHERS, best_run
from pikastream_jax.training.two_copies import Trajectory, TwoCopies, causal_velocity, random_chunks
from pikastream_jax.weights.safetensors_io import restore_into

if TYPE_CHECKING:
    import grain

TEACHER_RUNS = {"bidirectional": TEACHERS, "causal": ("dit_causal_teacher",)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Trajectories as they lie on the disk, with the conditions that they followed."""

    windows: ClipWindows  # `latents` are the true ones
    states: Float16[np.ndarray, "b s f r c z"]  # at the student's timesteps and at 0
    motion: Float[np.ndarray, "b f k"]  # what was told of it: partly drawn, so it cannot be drawn again
    chunk: Int[np.ndarray, "b"]  # latent frames that were solved together, after true ones; 0 where it was the whole window


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Solve a teacher's trajectories for dit_causal."""

    config: str = "tiny"
    """Preset in configs/."""
    runs: Path | None = None
    """Folder of all runs, runs/CONFIG by default."""
    kind: Literal["bidirectional", "causal"] = "bidirectional"
    """Which teacher: over whole windows, or chunk by chunk after true latents."""
    teacher: Path | None = None
    """Run folder or .safetensors; by default of all runs the first of dit_reward, dit_sft, dit_pretrain (bidirectional), or dit_causal_teacher (causal)."""
    clips: Path | None = None
    """Prepared clips; by default `clips` within the folder of all runs."""
    out: Path | None = None
    """Folder to write; by default `ode_pairs` within the folder of all runs, or `ode_pairs_causal`."""
    count: int = 1_500
    """Trajectories of training clips."""
    held_out: int = 48
    """Trajectories of held-out clips."""
    latent_frames: int = 9
    """Length of a window."""
    steps: int = 48
    """Of the solver, rounded up to a multiple of the student's."""
    text: float = 2.0
    """Scale of guidance by the prompt; 1 is none."""
    audio: float = 1.5
    """By the sound."""
    reference: float = 1.5
    """By the reference."""
    batch: int = 4
    """Windows solved at a time."""
    shard: int = 40
    """Trajectories of a shard, which is what is lost at most when the command is stopped."""
    seed: int = 0
    """Everything random follows from it."""

    def __post_init__(self):
        for name in ("count", "held_out", "latent_frames", "steps", "batch", "shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")

    @property
    def guidance(self) -> Guidance:
        return Guidance(self.text, self.audio, self.reference)


def solve(
    config: Config, model: Functional, params: Params, rows: DiTBatch, key: Array, settings: Arguments
) -> tuple[Float[Array, "s b f r c z"], Int[Array, "b"]]:
    """States at the student's timesteps and at 0, and the chunks that were solved together; see `Pairs`.

    Args:
      rows: what the trajectories are told; of their latents only the causal teacher sees something.
    """
    k_start, k_context, k_chunks = jax.random.split(key, 3)
    times, anchors = refined_timesteps(config.stream, settings.steps)
    start = jax.random.normal(k_start, rows.latents.shape)
    b, f = start.shape[:2]
    distance = jnp.full(b, float(config.stream.reference_distance))
    if settings.kind == "bidirectional":
        _, states = sample_teacher(model, params, rows, start, times, distance, settings.guidance, tuple(anchors))
        return states, jnp.zeros(b, jnp.int32)
    chunk_ids = random_chunks(k_chunks, b, f, config.stream.chunk)
    t_context = jnp.full((b, f), times[anchors[-2]])
    context = interpolate(rows.latents, jax.random.normal(k_context, start.shape), t_context)

    def velocity(x, t):
        both = jnp.concatenate([context, x], axis=1)
        t = jnp.concatenate([t_context, jnp.full((b, f), t)], axis=1)
        copies = TwoCopies(both, t, jnp.zeros_like(x), chunk_ids, distance)
        return guided(lambda told: causal_velocity(config, model, params, told, copies), rows, settings.guidance)

    _, states = euler(velocity, start, times, tuple(anchors))
    return states, jnp.sum(chunk_ids == 0, axis=1)


def pair_maker(
    config: Config, model: Functional, params: Params, clips: Path, settings: Arguments
) -> Callable[[str, int, int], Iterator[Record]]:
    """(split, first, count) -> those trajectories, for `write_records`; a function of its arguments and the seed alone."""
    data = clip_constants(clips)
    sources = {
        "train": windows(config, clips, "train", 1, settings.latent_frames, settings.seed),
        "held_out": windows(config, clips, "held_out", 1, settings.latent_frames, None),
    }

    @functools.partial(jax.jit, static_argnames="train")
    def one(params, data, batch, key, train):
        k_rows, k_solve = jax.random.split(key)
        rows = prepare_batch(config, data, batch, k_rows, train=False)
        # Some prompts are short, as in the other stages.
        rows = dataclasses.replace(rows, valid=prepare_batch(config, data, batch, k_rows, train=train, drop=0.0).valid)
        states, chunk = solve(config, model, params, rows, k_solve, settings)
        part = dataclasses.replace(batch, latents=rows.latents, reference=rows.reference, boxes=rows.boxes, valid=rows.valid)
        return Pairs(part, jnp.moveaxis(states, 0, 1), rows.motion, chunk)

    def make(split: str, first: int, count: int) -> Iterator[Record]:
        bar = tqdm(total=count, desc=f"{split} from {first}", unit="trajectory")
        for start in range(first, first + count, settings.batch):
            # Always whole batches, so that there is one program; what is too much is left out.
            rows = [sources[split][start + row] for row in range(settings.batch)]
            batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), split == "held_out"), start)
            made = jax.device_get(one(params, data, batch, key, split == "train"))
            for row in range(min(settings.batch, first + count - start)):
                bar.update()
                yield _record(jax.tree.map(lambda leaf, row=row: leaf[row], made))
        bar.close()

    return make


def _record(pair: Pairs) -> Record:
    kept = {field.name: getattr(pair.windows, field.name) for field in dataclasses.fields(ClipWindows)}
    kept |= {name: np.asarray(kept[name], np.float16) for name in ("latents", "reference")}
    return kept | {"states": np.asarray(pair.states, np.float16), "motion": pair.motion, "chunk": np.asarray(pair.chunk)}


def pair_batches(config: Config, folder: Path, split: str, batch: int, seed: int | None) -> "grain.MapDataset[Pairs]":
    """Batches of trajectories without end; element n is the batch of update n.

    Args:
      seed: of the order in each round; None for the order on the disk.

    Raises:
      ValueError: they were made for another preset, of parts of the picture, or for another student's timesteps. See also `Records`.
    """
    import grain

    inner = [field.name for field in dataclasses.fields(ClipWindows)]
    records = Records(folder, split, [*inner, "states", "motion", "chunk"])
    made_with = read_record(folder)["made_with"]
    times = solver_timesteps(config.stream.steps, config.stream.shift).tolist()
    for name, wanted in (("config", config.name), ("latent_grid", list(config.latent_grid)), ("timesteps", times)):
        if (found := made_with.get(name, "unknown")) != wanted:
            raise ValueError(f"{folder}: trajectories of {name} {found}, the student's is {wanted}: make them anew")

    def gathered(rows: list[Record]) -> Pairs:
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return Pairs(ClipWindows(**{name: stacked.pop(name) for name in inner}), **stacked)

    source = grain.MapDataset.source(records)
    source = source.repeat() if seed is None else source.seed(seed).shuffle().repeat()
    return source.batch(batch, batch_fn=gathered)


def check_same_clips(pairs: Path, clips: Path) -> None:
    """Raises ValueError where trajectories were solved over other clips than a run has: their latents may be another FlashVAE's."""
    now, then = read_record(clips)["made_with"], read_record(pairs)["made_with"].get("clips", {})
    if differences := sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name)):
        raise ValueError(f"{pairs} holds trajectories over other clips than {clips} ({', '.join(differences)} differ): delete it and make it anew")


def prepare_pairs(
    config: Config, data: dict[str, Any], pairs: Pairs, key: Array, *, train: bool = True
) -> tuple[DiTBatch, Trajectory, Int[Array, "b"]]:
    """What the student is told, with the trajectory's end for latents; the trajectory; and `Pairs.chunk`. Inside jit.

    No condition is dropped: the trajectory was guided by all of them.

    Args:
      data: has `clip_constants`.
      train: augment the sound, which does not change where the trajectory ends.
    """
    k_rows, k_context = jax.random.split(key)
    rows = prepare_batch(config, data, pairs.windows, k_rows, train=False)
    mel = prepare_batch(config, data, pairs.windows, k_rows, train=train).mel
    states = jnp.moveaxis(pairs.states.astype(jnp.float32), 1, 0)
    # A causal teacher's chunks were solved after true latents. Otherwise the context is what the student's last step starts from.
    t = jnp.full(rows.latents.shape[:2], solver_timesteps(config.stream.steps, config.stream.shift)[-2])
    given = interpolate(rows.latents, jax.random.normal(k_context, rows.latents.shape), t)
    context = jnp.where((pairs.chunk > 0)[:, None, None, None, None], given, states[-2])
    return dataclasses.replace(rows, latents=states[-1], mel=mel, motion=pairs.motion), Trajectory(states, context), pairs.chunk


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    try:
        settings = arguments_of(Arguments, "ode_pairs", given)
        config, runs = preset(settings.config), settings.runs or Path("runs") / settings.config
        clips = settings.clips or best_run(runs, ("clips",), "--clips")
        teacher = settings.teacher or best_run(runs, TEACHER_RUNS[settings.kind], "--teacher")
        folder = settings.out or runs / ("ode_pairs" if settings.kind == "bidirectional" else "ode_pairs_causal")
        model = functional(lambda rngs: Denoiser(config, rngs=rngs))
        params = restore_into(model.abstract, load_weights(teacher, "denoiser"))
        about = ("kind", "latent_frames", "steps", "text", "audio", "reference", "batch", "seed")
        made_with = {name: getattr(settings, name) for name in about} | {
            "config": config.name,
            "latent_grid": list(config.latent_grid),
            "timesteps": solver_timesteps(config.stream.steps, config.stream.shift).tolist(),
            "teacher": digest(*jax.tree.leaves(params)),
            "clips": read_record(clips)["made_with"],
        }
        plan = Plan({"train": settings.count, "held_out": settings.held_out}, settings.shard, made_with)
        write_records(folder, plan, pair_maker(config, model, params, clips, settings))
    except (ValueError, OSError) as error:
        print(f"ode_pairs: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {settings.count} trajectories of training clips and {settings.held_out} of held-out ones, {settings.kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
