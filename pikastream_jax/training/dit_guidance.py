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
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pikastream_jax.config import Config
from pikastream_jax.dit import Denoiser
from pikastream_jax.nn.layers import Functional, Params, functional
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.dit_causal import TwoCopies, causal_velocity, random_chunks, sample_causal, two_copies
from pikastream_jax.training.dit_data import (
    CROP,
    DiTBatch,
    draw_batch,
    load_data,
    text_kept,
    without_audio,
    without_reference,
    without_text,
)
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.previews import save_preview
from pikastream_jax.weights.safetensors_io import restore_into


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """Settings of the stage. A scale of 1 is no guidance."""

    batch: int = 6
    latent_frames: int = 9
    text: float = 3.2
    audio: float = 1.5
    reference: float = 1.6
    ema: float = 0.98
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=1e-3, warmup_steps=20, decay="linear")


def guided_velocity(
    config: Config, model: Functional, params: Params, batch: DiTBatch, copies: TwoCopies, scales: GuidanceConfig
) -> Float[Array, "b f r c z"]:
    """The velocity with every condition, and (scale - 1) times what text, sound and reference each change in it."""
    told = causal_velocity(config, model, params, batch, copies)
    velocity = told
    without = ((scales.text, without_text), (scales.audio, without_audio), (scales.reference, without_reference))
    for scale, untold in ((scale, drop(batch)) for scale, drop in without):
        velocity = velocity + (scale - 1.0) * (told - causal_velocity(config, model, params, untold, copies))
    return velocity


def build(config: Config, seed: int, init: dict[str, Path], updates: int = 200, learning_rate: float | None = None) -> Stage:
    """The stage. `init` names `clips`, `flash_vae` (for pictures) and `denoiser`, the student of `dit_causal` to start from."""
    settings = GuidanceConfig()
    if learning_rate is not None:
        settings = dataclasses.replace(settings, optimiser=dataclasses.replace(settings.optimiser, learning_rate=learning_rate))
    model = functional(lambda rngs: Denoiser(config, rngs=rngs))
    optimiser = make_optimiser(model.abstract, settings.optimiser, updates)

    def unguided() -> Params:
        return restore_into(model.abstract, load_weights(init["denoiser"]))

    def errors(params: Params, guide: Params, batch: DiTBatch, key: Array, chunk_ids: Int[Array, "b f"]) -> dict[str, Float[Array, ""]]:
        """`loss`, the weighted squared error against the guided velocity."""
        copies = two_copies(config, batch, key, chunk_ids)
        target = jax.lax.stop_gradient(guided_velocity(config, model, guide, batch, copies, settings))
        error = jnp.mean((causal_velocity(config, model, params, batch, copies) - target) ** 2, axis=-1)
        return {"loss": jnp.mean(batch.weight * error)}

    def update(state: TrainState, key: Array, data: dict) -> tuple[TrainState, dict]:
        k_data, k_chunks, k_loss = jax.random.split(key, 3)
        batch = split_batch(draw_batch(config, data, "train", k_data, settings.batch, settings.latent_frames, crop=CROP))
        chunk_ids = random_chunks(k_chunks, settings.batch, settings.latent_frames, config.stream.chunk)

        def total(params: Params) -> tuple[Float[Array, ""], dict]:
            parts = errors(text_kept(params), data["guide"], batch, k_loss, chunk_ids)
            return parts["loss"], parts

        gradient, parts = jax.grad(total, has_aux=True)(state.params)
        return state.descend(gradient, optimiser, settings.ema), parts

    data = functools.cache(lambda: load_data(init["clips"]) | {"guide": unguided()})

    @jax.jit
    def held_out(params, data):
        batch = draw_batch(config, data, "held_out", jax.random.key(0), 12, settings.latent_frames, train=False)
        chunk_ids = jnp.broadcast_to(jnp.arange(settings.latent_frames) // config.stream.chunk, (12, settings.latent_frames))
        return errors(params, data["guide"], batch, jax.random.key(1), chunk_ids)

    @jax.jit
    def roll_out(params, data):
        batch = draw_batch(config, data, "held_out", jax.random.key(0), 4, settings.latent_frames, train=False)
        return batch.latents, sample_causal(config, model, params, batch, jax.random.key(2))

    def sample(state: TrainState, path: Path) -> None:
        truth, generated = roll_out(state.ema, data())
        save_preview(config, init, path, np.asarray(truth), np.asarray(generated))

    return Stage(
        name="dit_guidance",
        total_steps=updates,
        seed=seed,
        init=lambda: TrainState.start(unguided(), optimiser),
        update=update,
        data=data,
        config={
            "preset": config.name,
            "dit": dataclasses.asdict(config.dit),
            "stream": dataclasses.asdict(config.stream),
            "stage": dataclasses.asdict(settings),
        },
        evaluate=lambda state: held_out(state.ema, data()),
        evaluate_every=50,
        sample=sample,
        sample_every=100,
    )
