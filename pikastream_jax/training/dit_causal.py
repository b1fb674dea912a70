"""Causal adaptation: the bidirectional teacher becomes a chunk-by-chunk student that works in few steps.

`--objective ode` regresses the end of the teacher's trajectories from their states at the student's timesteps (`ode_pairs`, `two_copies`),
`data` the clips themselves from clips with noise (teacher forcing), `diffusion_forcing` the same with one copy in which every chunk has a
timestep of its own, to compare. `--schedule rolling` trains on the data for the engine's rolling mode (`rolling`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pikastream_jax.config import Config
from pikastream_jax.dit import Denoiser
from pikastream_jax.nn.layers import Functional, Params, functional
from pikastream_jax.streaming.state import init_state, install_reference
from pikastream_jax.streaming.step import Models, denoise_chunk
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.dit_data import (
    ClipWindows,
    DiTBatch,
    clip_constants,
    prepare_batch,
    text_kept,
    windows,
)
from pikastream_jax.training.latent_reader import LatentReader, check_closures, load_reader, reader_model
from pikastream_jax.training.loop import Metrics, Stage, TrainState
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.ode_pairs import Pairs, check_same_clips, pair_batches, prepare_pairs
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.previews import save_preview
from pikastream_jax.training.rolling import pass_count, random_sizes, rolling_losses
from pikastream_jax.training.settings import DiTSettings, Optimiser, StageSettings
from pikastream_jax.training.training_form import training_form, training_models
from pikastream_jax.training.two_copies import (
    Trajectory,
    causal_losses,
    diffusion_forcing_losses,
    random_chunks,
    stream_chunks,
    two_copies,
)
from pikastream_jax.weights.safetensors_io import restore_into

HELD_OUT = 24  # clips or trajectories


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(DiTSettings):
    """Settings of the stage; a row of a batch is a window of a clip."""

    updates: int = 500
    batch: int = 6
    latent_frames: int = 9
    """So that the last chunk of three sees the whole window, as in a stream. Trajectories have their own length."""
    objective: Literal["ode", "data", "diffusion_forcing"] = "ode"
    """What is regressed, see above."""
    schedule: Literal["sequential", "rolling"] = "sequential"
    """Of the stream that the student is for."""
    timesteps: Literal["solver", "all"] = "solver"
    """Of the query copy: the student's, or any, for a causal teacher whose trajectories shall be solved."""
    reading: float = 1.0
    """Weight of what the latent reader misreads of the expression."""
    likeness: float = 1.0
    """Weight of what it misreads of the face's own features."""
    closures: float = 0.1
    """Weight of the cross-entropy of closed lips, as the latent reader sees them."""
    optimiser: Optimiser = OptimiserConfig(learning_rate=1.5e-3, warmup_steps=20, decay="linear")

    def __post_init__(self):
        super().__post_init__()
        check_closures(self.closures)
        if self.schedule == "rolling" and self.objective != "data":
            raise ValueError(f"schedule rolling is trained on the data alone, not with objective {self.objective}: add --objective data")
        if self.timesteps == "all" and (self.objective != "data" or self.schedule == "rolling"):
            raise ValueError("timesteps all are for objective data and schedule sequential alone: trajectories and buffers have their own")

    def passed_over(self, given: Mapping[str, Path]) -> tuple[str, ...]:
        del given
        return () if self.objective == "ode" else ("pairs",)


def sample_causal(
    config: Config, model: Functional, params: Params, batch: DiTBatch, key: Array
) -> Float[Array, "b f r c z"]:
    """Rolls the student out with the inference code itself; frames must be whole chunks."""
    models = Models.of(config)
    b, f = batch.latents.shape[:2]
    denoiser = model.bind(params)
    state = install_reference(init_state(config, b), denoiser.dit.reference_keys_values(batch.reference))
    text, valid = denoiser.text_conditions(batch.tokens, batch.valid, batch.frame_prompt)
    size = config.stream.chunk
    chunks = []
    for first in range(0, f, size):
        now = slice(first, first + size)
        text_now = jax.tree.map(lambda kv, now=now: kv[:, :, now], text)
        conditions = denoiser.conditions(text_now, valid[:, now], batch.mel[:, now], batch.motion[:, now])
        noise = jax.random.normal(jax.random.fold_in(key, first), (b, size, *batch.latents.shape[2:]))
        state, latents = denoise_chunk(models, params, state, conditions, noise)
        chunks.append(latents)
    return jnp.concatenate(chunks, axis=1)


def sampler(
    config: Config, model: Functional, init: dict[str, Path], unseen: Callable[[], ClipWindows]
) -> Callable[[TrainState, dict, Path], None]:
    """Draws the roll-outs of the first four `unseen` clips under the truth; see `Stage.sample`."""

    @jax.jit
    def roll_out(params, data, batch):
        rows = prepare_batch(config, data, jax.tree.map(lambda leaf: leaf[:4], batch), jax.random.key(0), train=False)
        return rows.latents, sample_causal(config, model, params, rows, jax.random.key(2))

    def sample(state: TrainState, data: dict, path: Path) -> None:
        truth, generated = roll_out(state.ema, data, unseen())
        save_preview(config, init, path, np.asarray(truth), np.asarray(generated))

    return sample


def sequence_chunks(config: Config, key: Array, batch: int, frames: int, train: bool) -> Int[Array, "b f"]:
    """Chunk of every latent frame: random ones in training, else the stream's own."""
    return random_chunks(key, batch, frames, config.stream.chunk) if train else stream_chunks(config, batch, frames)


def asked(parts: Metrics, settings: Settings) -> Float[Array, ""]:
    """What an update lowers: the velocity error and, weighted, what the latent reader misreads."""
    return parts["loss"] + settings.likeness * parts["identity"] + settings.reading * parts["expression"] + settings.closures * parts["closures"]


def teacher_forcing_loss(
    config: Config, model: Functional, params: Params, batch: DiTBatch, key: Array, reader: LatentReader, settings: Settings, *, train: bool
) -> tuple[Float[Array, ""], Metrics]:
    """What an update with objective `data` lowers, by the weights of `settings`; and its parts, see `causal_losses`."""
    k_chunks, k_loss = jax.random.split(key)
    chunk_ids = sequence_chunks(config, k_chunks, *batch.latents.shape[:2], train)
    parts = causal_losses(config, model, params, batch, two_copies(config, batch, k_loss, chunk_ids), reader)
    return asked(parts, settings), parts


def record(config: Config, settings: StageSettings) -> dict[str, Any]:
    """What a run of a student's stage was trained with, see `Stage.config`."""
    parts = {"dit": config.dit, "stream": config.stream}
    return {"preset": config.name, "stage": settings.record()} | {name: dataclasses.asdict(part) for name, part in parts.items()}


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage. `init` names `clips`, `reader`, `flash_vae` (for pictures), `denoiser`, the pre-trained teacher, and for objective `ode` the
    `pairs`, trajectories of `ode_pairs`.

    Raises:
      ValueError: no trajectories where they are asked for, or of other clips; or windows shorter than what is in flight.
    """
    ode = settings.objective == "ode"
    if ode and "pairs" not in init:
        raise ValueError("objective ode needs trajectories: make them with `python -m pikastream_jax.training.ode_pairs`, or name them with --init pairs=PATH")
    if ode:
        check_same_clips(init["pairs"], init["clips"])
    config = dataclasses.replace(config, stream=dataclasses.replace(config.stream, schedule=settings.schedule))
    if config.stream.rolling:
        pass_count(config.stream, settings.latent_frames)
    model = training_form(functional(lambda rngs: Denoiser(config, rngs=rngs)), settings.form)
    reader = reader_model(config)
    optimiser = make_optimiser(model.abstract, settings.optimiser, settings.updates)
    largest = config.stream.chunk

    def initial_state() -> TrainState:
        return TrainState.start(restore_into(model.abstract, load_weights(init["denoiser"], "denoiser")), optimiser)

    def losses(
        params: Params, rows: DiTBatch, key: Array, told: LatentReader, chunk_ids: Int[Array, "b f"], trajectory: Trajectory | None
    ) -> dict[str, Float[Array, ""]]:
        if settings.objective == "diffusion_forcing":
            return diffusion_forcing_losses(config, model, params, rows, key, chunk_ids, told)
        copies = two_copies(config, rows, key, chunk_ids, trajectory, all_timesteps=settings.timesteps == "all")
        return causal_losses(config, model, params, rows, copies, told)

    def of_batch(params: Params, data: dict, batch: ClipWindows | Pairs, key: Array, train: bool) -> dict[str, Float[Array, ""]]:
        """The objective's losses of a batch as it lies on the disk; held-out ones with the stream's own chunks."""
        k_rows, k_chunks, k_loss = jax.random.split(key, 3)
        told = reader.bind(data["reader"])
        if ode:
            rows, trajectory, solved = prepare_pairs(config, data, batch, k_rows, train=train)
        else:
            rows, trajectory = prepare_batch(config, data, batch, k_rows, train=train), None
        rows = split_batch(rows) if train else rows
        b, f = rows.latents.shape[:2]
        if config.stream.rolling:
            size = random_sizes(k_chunks, config.stream, b) if train else jnp.full(b, largest)
            models = training_models(Models.of(config), settings.form)
            return rolling_losses(models, params, rows, k_loss, size, told)
        chunk_ids = sequence_chunks(config, k_chunks, b, f, train)
        if ode:  # a causal teacher's chunks are as it solved them
            chunk_ids = jnp.where(solved[:, None] > 0, jnp.arange(f) // jnp.maximum(solved[:, None], 1), chunk_ids)
        return losses(params, rows, k_loss, told, chunk_ids, trajectory)

    def update(state: TrainState, key: Array, data: dict, batch: ClipWindows | Pairs) -> tuple[TrainState, dict]:
        def total(params: Params) -> tuple[Float[Array, ""], dict]:
            parts = of_batch(text_kept(params), data, batch, key, True)
            return asked(parts, settings), parts

        gradient, parts = jax.grad(total, has_aux=True)(state.params)
        return state.descend(gradient, optimiser, settings.ema), parts

    def batches(split: str, batch: int, seed: int | None):
        if ode:
            return pair_batches(config, init["pairs"], split, batch, seed)
        return windows(config, init["clips"], split, batch, settings.latent_frames, seed)

    unseen = functools.cache(lambda: batches("held_out", HELD_OUT, None)[0])
    held_out = jax.jit(lambda params, data, batch: of_batch(params, data, batch, jax.random.key(0), False))
    # A rolling stream's pictures come from the engine alone: here nothing fills its buffer.
    shown = functools.cache(lambda: windows(config, init["clips"], "held_out", 4, _whole_chunks(settings.latent_frames, largest), None)[0])
    draws = None if config.stream.rolling else sampler(config, functional(lambda rngs: Denoiser(config, rngs=rngs)), init, shown)

    return Stage(
        name="dit_causal",
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        data=lambda: clip_constants(init["clips"]) | {"reader": load_reader(config, init["reader"])},
        batches=lambda: batches("train", settings.batch, seed),
        config=record(config, settings),
        evaluate=lambda state, data: held_out(state.ema, data, unseen()),
        evaluate_every=settings.every(100),
        sample=draws,
        sample_every=300,
    )


def _whole_chunks(frames: int, size: int) -> int:
    return max(size, frames // size * size)
