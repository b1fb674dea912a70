"""Guidance without its price: the student learns to answer as a guided student would (Meng et al. 2023, arXiv 2210.03142).

Classifier-free guidance (Ho and Salimans 2022) adds, per condition, a multiple of what that condition changes in the velocity. It makes
up for what regression takes away: a student of few steps answers with the mean of what may be, which smiles less than the prompt says
and looks less like the reference than it could. Done while streaming it would cost a forward pass more for every condition; here the
frozen student that the stage starts from is guided, and its guided velocity is the target.
"""

import dataclasses
import functools
from pathlib import Path

import jax
from jaxtyping import Array, Float, Int

from pikastream_jax.config import Config
from pikastream_jax.dit import Denoiser
from pikastream_jax.nn.layers import Functional, Params, functional
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.dit_causal import record, sampler
from pikastream_jax.training.dit_data import (
    ClipWindows,
    DiTBatch,
    clip_constants,
    prepare_batch,
    text_kept,
    weighted_velocity_loss,
    windows,
)
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.processes import on_the_host
from pikastream_jax.training.sampling import Guidance, guided
from pikastream_jax.training.settings import DiTSettings, Optimiser
from pikastream_jax.training.training_form import training_form
from pikastream_jax.training.two_copies import TwoCopies, causal_velocity, random_chunks, stream_chunks, two_copies
from pikastream_jax.weights.safetensors_io import restore_into


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(DiTSettings):
    """Settings of the stage. A scale of 1 is no guidance."""

    updates: int = 200
    batch: int = 6
    latent_frames: int = 9
    text: float = 3.2
    audio: float = 1.5
    reference: float = 1.9
    ema: float = 0.98
    optimiser: Optimiser = OptimiserConfig(learning_rate=1e-3, warmup_steps=20, decay="linear")


def guided_velocity(
    config: Config, model: Functional, params: Params, batch: DiTBatch, copies: TwoCopies, scales: Settings
) -> Float[Array, "b f r c z"]:
    """The velocity with every condition, and (scale - 1) times what text, sound and reference each change in it."""
    asked = Guidance(scales.text, scales.audio, scales.reference)
    return guided(lambda told: causal_velocity(config, model, params, told, copies), batch, asked)


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage. `init` names `clips`, `flash_vae` (for pictures) and `denoiser`, the student of `dit_causal` to start from and to guide; or to
    start from alone, where it names a `guide`.
    """
    model = training_form(functional(lambda rngs: Denoiser(config, rngs=rngs)), settings.form)
    optimiser = make_optimiser(model.abstract, settings.optimiser, settings.updates)

    def weights(name: str) -> Params:
        return restore_into(model.abstract, load_weights(init[name], "denoiser"))

    def error(params: Params, guide: Params, batch: DiTBatch, key: Array, chunk_ids: Int[Array, "b f"]) -> Float[Array, ""]:
        copies = two_copies(config, batch, key, chunk_ids)
        wanted = guided_velocity(config, model, guide, batch, copies, settings)
        return weighted_velocity_loss(causal_velocity(config, model, params, batch, copies), wanted, batch.weight)

    def update(state: TrainState, key: Array, data: dict, batch: ClipWindows) -> tuple[TrainState, dict]:
        k_data, k_chunks, k_loss = jax.random.split(key, 3)
        rows = split_batch(prepare_batch(config, data, batch, k_data))
        chunk_ids = random_chunks(k_chunks, settings.batch, settings.latent_frames, config.stream.chunk)
        value, gradient = jax.value_and_grad(lambda params: error(text_kept(params), data["guide"], rows, k_loss, chunk_ids))(state.params)
        return state.descend(gradient, optimiser, settings.ema), {"loss": value}

    def data() -> dict:
        with on_the_host():
            return clip_constants(init["clips"]) | {"guide": weights("guide" if "guide" in init else "denoiser")}

    unseen = functools.cache(lambda: windows(config, init["clips"], "held_out", 12, settings.latent_frames, None)[0])

    @jax.jit
    def held_out(params, data, batch):
        rows = prepare_batch(config, data, batch, jax.random.key(0), train=False)
        chunk_ids = stream_chunks(config, 12, settings.latent_frames)
        return {"loss": error(params, data["guide"], rows, jax.random.key(1), chunk_ids)}

    return Stage(
        name="dit_guidance",
        total_steps=settings.updates,
        seed=seed,
        init=lambda: TrainState.start(weights("denoiser"), optimiser),
        update=update,
        data=data,
        batches=lambda: windows(config, init["clips"], "train", settings.batch, settings.latent_frames, seed),
        config=record(config, settings),
        evaluate=lambda state, data: held_out(state.ema, data, unseen()),
        evaluate_every=settings.every(50),
        sample=sampler(config, functional(lambda rngs: Denoiser(config, rngs=rngs)), init, unseen),
        sample_every=100,
    )
