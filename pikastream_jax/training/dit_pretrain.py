"""DiT pre-training: bidirectional flow matching with condition dropout, so that guidance works later."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.diffusion.flow import interpolate, logit_normal_timesteps, solver_timesteps
from pikastream_jax.dit import Denoiser
from pikastream_jax.nn.layers import Functional, Params, functional, initial_params
from pikastream_jax.training.accumulate import mean_gradient
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
from pikastream_jax.training.latent_reader import LatentReader, check_closures, load_reader, misreading, reader_model
from pikastream_jax.training.loop import Metrics, Stage, TrainState
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.previews import save_preview
from pikastream_jax.training.sampling import bidirectional_velocity, sample_teacher
from pikastream_jax.training.settings import DiTSettings, Optimiser
from pikastream_jax.training.training_form import training_form
from pikastream_jax.weights.safetensors_io import restore_into


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(DiTSettings):
    """Settings of the stage; a row of a batch is a window of a clip."""

    updates: int = 3_000
    batch: int = 8
    accumulate: int = 1
    """Slices in which an update takes its batch, one after another, where the whole of it does not fit in memory."""
    latent_frames: int = 9
    """As many as trajectories are solved over."""
    shift: float = 3.0
    """Of the logit-normal timesteps."""
    reading: float = 0.7
    """Weight of what the latent reader misreads of face and expression."""
    closures: float = 0.1
    """Weight of the cross-entropy of closed lips, as the latent reader sees them."""
    pure_noise: float = 0.25
    """Chance of a row to stand at t = 1, where the conditions alone tell what to draw and logit-normal timesteps hardly come."""
    optimiser: Optimiser = OptimiserConfig(learning_rate=3e-3, warmup_steps=50, decay="linear")

    def __post_init__(self):
        super().__post_init__()
        check_closures(self.closures)

    def passed_over(self, given: Mapping[str, Path]) -> tuple[str, ...]:
        """A denoiser has encoders of its own, which its other parts were trained with."""
        return ("audio", "text") if "denoiser" in given else ()


def timesteps(key: Array, rows: int, settings: Settings) -> Float[Array, " rows"]:
    """Where each row is trained: pure noise by chance, else logit-normal.

    By chance and not for so and so many of the rows, whose share would grow as a batch is taken in smaller slices.
    """
    k_pure, k_t = jax.random.split(key)
    pure = jax.random.uniform(k_pure, (rows,)) < settings.pure_noise
    return jnp.where(pure, 1.0, logit_normal_timesteps(k_t, (rows,), settings.shift))


def flow_matching_loss(
    model: Functional, params: Params, batch: DiTBatch, key: Array, reader: LatentReader, settings: Settings
) -> tuple[Float[Array, ""], Metrics]:
    """What an update lowers, by the timesteps and weights of `settings`; and its parts: `loss`, the velocity error, and what `misreading` gives."""
    k_t, k_noise, k_distance = jax.random.split(key, 3)
    b, f = batch.latents.shape[:2]
    t = jnp.broadcast_to(timesteps(k_t, b, settings)[:, None], (b, f))
    noise = jax.random.normal(k_noise, batch.latents.shape)
    distance = jax.random.randint(k_distance, (b,), 4, 31).astype(jnp.float32)
    x = interpolate(batch.latents, noise, t)
    velocity = bidirectional_velocity(model, params, batch, x, t, distance)
    value = weighted_velocity_loss(velocity, noise - batch.latents, batch.weight)
    misread = misreading(reader, batch, velocity, noise, t)
    asked = settings.reading * (misread["identity"] + misread["expression"]) + settings.closures * misread["closures"]
    return value + asked, {"loss": value} | misread


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage. `init` names `clips`, `reader` and `flash_vae` (for pictures), and may name a `denoiser` to start from and, as `audio` and
    `text`, runs of `audio_pretrain` and `text_pretrain` whose encoders take the place of its own.

    Raises:
      ValueError: neither a `denoiser` nor both encoders are named: this stage trains no text encoder, and lips hardly follow a new one of sound.
    """
    if "denoiser" not in init and (missing := [name for name in ("audio", "text") if name not in init]):
        raise ValueError(f"dit_pretrain needs {' and '.join(missing)}: run {' and '.join(f'{name}_pretrain' for name in missing)} first, or give --init denoiser=PATH to start from")
    return flow_matching_stage(config, "dit_pretrain", seed, init, settings)


def flow_matching_stage(
    config: Config, name: str, seed: int, init: dict[str, Path], settings: Settings, *, curated: bool = False, crop: float = CROP
) -> Stage:
    """Flow matching on clips, on the best of them alone where they are `curated`, and on a part of the picture (`prepare_batch`). Held-out figures are
    always of all held-out clips and whole pictures."""

    def build_model(rngs):
        return Denoiser(config, rngs=rngs)

    model = training_form(functional(build_model), settings.form)
    optimiser = make_optimiser(model.abstract, settings.optimiser, settings.updates)

    def initial_state() -> TrainState:
        if "denoiser" in init:
            params = restore_into(model.abstract, load_weights(init["denoiser"], "denoiser"))
        else:
            params = initial_params(build_model, jax.random.key(seed))
        for encoder in ("audio", "text"):
            if encoder in init:
                params[encoder] = restore_into(model.abstract[encoder], load_weights(init[encoder], "denoiser")[encoder])
        return TrainState.start(params, optimiser)

    reader = reader_model(config)

    def losses(params: Params, batch: DiTBatch, key: Array, reader_params: Params) -> tuple[Float[Array, ""], Metrics]:
        return flow_matching_loss(model, text_kept(params), batch, key, reader.bind(reader_params), settings)

    def update(state: TrainState, key: Array, data: dict, batch: ClipWindows) -> tuple[TrainState, dict]:
        k_data, k_loss = jax.random.split(key)
        rows = split_batch(prepare_batch(config, data, batch, k_data, crop=crop))
        gradient, parts = mean_gradient(losses, settings.accumulate)(state.params, rows, k_loss, data["reader"])
        return state.descend(gradient, optimiser, settings.ema), parts

    unseen = functools.cache(lambda: windows(config, init["clips"], "held_out", 24, settings.latent_frames, None)[0])

    @jax.jit
    def held_out(params, data, batch):
        rows = prepare_batch(config, data, batch, jax.random.key(0), train=False)
        return losses(params, rows, jax.random.key(1), data["reader"])[1]

    @jax.jit
    def sample_clip(params, data, batch):
        rows = prepare_batch(config, data, jax.tree.map(lambda leaf: leaf[:4], batch), jax.random.key(0), train=False)
        start = jax.random.normal(jax.random.key(2), rows.latents.shape)
        distance = jnp.full(4, float(config.stream.reference_distance))
        return rows.latents, sample_teacher(model, params, rows, start, solver_timesteps(12, settings.shift), distance)[0]

    def sample(state: TrainState, data: dict, path: Path) -> None:
        truth, generated = sample_clip(state.ema, data, unseen())
        save_preview(config, init, path, np.asarray(truth), np.asarray(generated))

    return Stage(
        name=name,
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        data=lambda: clip_constants(init["clips"]) | {"reader": load_reader(config, init["reader"])},
        batches=lambda: windows(config, init["clips"], "train", settings.batch, settings.latent_frames, seed, curated=curated),
        config={"preset": config.name, "dit": dataclasses.asdict(config.dit), "stage": settings.record()},
        evaluate=lambda state, data: held_out(state.ema, data, unseen()),
        evaluate_every=settings.every(200),
        sample=sample,
        sample_every=max(400, settings.updates // 5),
        frames=4 * settings.batch * settings.latent_frames,
    )
