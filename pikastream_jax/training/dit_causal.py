"""Causal adaptation: the bidirectional teacher becomes a chunk-by-chunk student that works in few steps.

Two copies of the sequence: the context copy stands at the last timestep of the solver, because the keys and values that inference
caches are those of its last denoising step; the query copy stands at one of the solver's timesteps, one per chunk. A query chunk
sees earlier context chunks and itself, a context chunk earlier context and itself; chunk sizes are random per sequence.

The regression target is the data itself (teacher forcing), not yet the teacher's trajectory.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pikastream_jax.config import Config
from pikastream_jax.diffusion.flow import interpolate, solver_timesteps
from pikastream_jax.dit import Denoiser
from pikastream_jax.nn.layers import Functional, Params, functional
from pikastream_jax.streaming.state import init_state, install_reference
from pikastream_jax.streaming.step import Models, denoise_chunk
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.dit_data import (
    CROP,
    ClipWindows,
    DiTBatch,
    clip_constants,
    prepare_batch,
    text_kept,
    weighted_velocity_loss,
    windows,
)
from pikastream_jax.training.latent_reader import LatentReader, load_reader, misreading, reader_model
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.previews import save_preview
from pikastream_jax.training.settings import DiTSettings, Optimiser, StageSettings
from pikastream_jax.training.training_form import training_form
from pikastream_jax.weights.safetensors_io import restore_into

MORE_NOISE = 1 / 3  # share of chunks that are moved to pure noise, where a step decides what the chunk will show


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(DiTSettings):
    """Settings of the stage; a row of a batch is a window of a clip."""

    updates: int = 500
    batch: int = 6
    latent_frames: int = 9
    """So that the last chunk of three sees the whole window, as in a stream."""
    reading: float = 1.0
    """Weight of what the latent reader misreads."""
    optimiser: Optimiser = OptimiserConfig(learning_rate=1.5e-3, warmup_steps=20, decay="linear")


def random_chunks(key: Array, batch: int, frames: int, largest: int) -> Int[Array, "b f"]:
    """Chunk of every latent frame: the largest size in two sequences of three, else any size up to it."""
    k_any, k_size = jax.random.split(key)
    size = jax.random.randint(k_size, (batch, 1), 1, largest + 1)
    size = jnp.where(jax.random.uniform(k_any, (batch, 1)) < 2 / 3, largest, size)
    return jnp.arange(frames) // size


def stream_chunks(config: Config, batch: int, frames: int) -> Int[Array, "b f"]:
    """Chunk of every latent frame as in a stream."""
    return jnp.broadcast_to(jnp.arange(frames) // config.stream.chunk, (batch, frames))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoCopies:
    """What the two copies of a batch show: the network's question, and what its answer is held against."""

    x: Float[Array, "b 2f r c z"]  # context copy, query copy
    t: Float[Array, "b 2f"]
    query_noise: Float[Array, "b f r c z"]
    chunk_ids: Int[Array, "b f"]
    reference_distance: Float[Array, "b"]

    @property
    def t_query(self) -> Float[Array, "b f"]:
        return self.t[:, self.chunk_ids.shape[1] :]


def two_copies(config: Config, batch: DiTBatch, key: Array, chunk_ids: Int[Array, "b f"]) -> TwoCopies:
    """Draws noise, the query copy's timesteps and the reference's place."""
    k_step, k_context, k_query, k_distance = jax.random.split(key, 4)
    b, f = chunk_ids.shape
    times = jnp.asarray(solver_timesteps(config.stream.steps, config.stream.shift))
    k_first, k_any = jax.random.split(k_step)
    step_of_chunk = jax.random.randint(k_any, (b, f), 0, config.stream.steps)
    step_of_chunk = jnp.where(jax.random.uniform(k_first, (b, f)) < MORE_NOISE, 0, step_of_chunk)
    t_query = times[jnp.take_along_axis(step_of_chunk, chunk_ids, axis=1)]
    t_context = jnp.full((b, f), times[config.stream.steps - 1])
    context_noise = jax.random.normal(k_context, batch.latents.shape)
    query_noise = jax.random.normal(k_query, batch.latents.shape)
    x = [interpolate(batch.latents, context_noise, t_context), interpolate(batch.latents, query_noise, t_query)]
    distance = jax.random.randint(k_distance, (b,), 4, 31).astype(jnp.float32)
    return TwoCopies(jnp.concatenate(x, axis=1), jnp.concatenate([t_context, t_query], axis=1), query_noise, chunk_ids, distance)


def causal_velocity(config: Config, model: Functional, params: Params, batch: DiTBatch, copies: TwoCopies) -> Float[Array, "b f r c z"]:
    """The student's velocity of the query copy."""
    denoiser = model.bind(params)
    text, valid = denoiser.text_conditions(batch.tokens, batch.valid, batch.frame_prompt)
    once = denoiser.conditions(text, valid, batch.mel, batch.motion, batch.keep_audio)
    text, audio = jax.tree.map(lambda kv: jnp.concatenate([kv, kv], axis=2), (once.text, once.audio))
    valid, motion = (jnp.concatenate([x, x], axis=1) for x in (once.text_valid, once.motion))
    twice = dataclasses.replace(once, text=text, text_valid=valid, audio=audio, motion=motion)
    velocity = denoiser.dit.forward_sequence(
        copies.x,
        copies.t,
        twice,
        denoiser.dit.reference_keys_values(batch.reference),
        chunk_ids=copies.chunk_ids,
        window=config.stream.window,
        reference_distance=copies.reference_distance,
        copies=2,
    )
    return velocity[:, copies.chunk_ids.shape[1] :]


def causal_losses(
    config: Config, model: Functional, params: Params, batch: DiTBatch, key: Array, chunk_ids: Int[Array, "b f"], reader: LatentReader
) -> dict[str, Float[Array, ""]]:
    """Of the query copy: `loss`, the velocity error, and what `misreading` gives."""
    copies = two_copies(config, batch, key, chunk_ids)
    velocity = causal_velocity(config, model, params, batch, copies)
    value = weighted_velocity_loss(velocity, copies.query_noise - batch.latents, batch.weight)
    return {"loss": value} | misreading(reader, batch, velocity, copies.query_noise, copies.t_query)


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
    config: Config, model: Functional, init: dict[str, Path], data: Callable[[], dict], unseen: Callable[[], ClipWindows]
) -> Callable[[TrainState, Path], None]:
    """Draws the roll-outs of the first four `unseen` clips under the truth; see `Stage.sample`."""

    @jax.jit
    def roll_out(params, data, batch):
        rows = prepare_batch(config, data, jax.tree.map(lambda leaf: leaf[:4], batch), jax.random.key(0), train=False)
        return rows.latents, sample_causal(config, model, params, rows, jax.random.key(2))

    def sample(state: TrainState, path: Path) -> None:
        truth, generated = roll_out(state.ema, data(), unseen())
        save_preview(config, init, path, np.asarray(truth), np.asarray(generated))

    return sample


def record(config: Config, settings: StageSettings) -> dict[str, Any]:
    """What a run of a student's stage was trained with, see `Stage.config`."""
    parts = {"dit": config.dit, "stream": config.stream}
    return {"preset": config.name, "stage": settings.record()} | {name: dataclasses.asdict(part) for name, part in parts.items()}


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage. `init` names `clips`, `reader`, `flash_vae` (for pictures) and `denoiser`, the pre-trained teacher."""
    model = training_form(functional(lambda rngs: Denoiser(config, rngs=rngs)), settings.form)
    reader = reader_model(config)
    optimiser = make_optimiser(model.abstract, settings.optimiser, settings.updates)

    def initial_state() -> TrainState:
        params = restore_into(model.abstract, load_weights(init["denoiser"]))
        return TrainState.start(params, optimiser)

    def update(state: TrainState, key: Array, data: dict, batch: ClipWindows) -> tuple[TrainState, dict]:
        k_data, k_chunks, k_loss = jax.random.split(key, 3)
        rows = split_batch(prepare_batch(config, data, batch, k_data, crop=CROP))
        chunk_ids = random_chunks(k_chunks, settings.batch, settings.latent_frames, config.stream.chunk)

        def total(params: Params) -> tuple[Float[Array, ""], dict]:
            parts = causal_losses(config, model, text_kept(params), rows, k_loss, chunk_ids, reader.bind(data["reader"]))
            return parts["loss"] + settings.reading * (parts["identity"] + parts["expression"]), parts

        gradient, parts = jax.grad(total, has_aux=True)(state.params)
        return state.descend(gradient, optimiser, settings.ema), parts

    data = functools.cache(lambda: clip_constants(init["clips"]) | {"reader": load_reader(config, init["reader"])})

    unseen = functools.cache(lambda: windows(config, init["clips"], "held_out", 24, settings.latent_frames, None)[0])

    @jax.jit
    def held_out(params, data, batch):
        rows = prepare_batch(config, data, batch, jax.random.key(0), train=False)
        chunk_ids = stream_chunks(config, 24, settings.latent_frames)
        return causal_losses(config, model, params, rows, jax.random.key(1), chunk_ids, reader.bind(data["reader"]))

    return Stage(
        name="dit_causal",
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        data=data,
        batches=lambda: windows(config, init["clips"], "train", settings.batch, settings.latent_frames, seed),
        config=record(config, settings),
        evaluate=lambda state: held_out(state.ema, data(), unseen()),
        evaluate_every=100,
        sample=sampler(config, functional(lambda rngs: Denoiser(config, rngs=rngs)), init, data, unseen),
        sample_every=150,
    )
