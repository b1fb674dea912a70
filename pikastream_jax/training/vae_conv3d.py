"""A 3D-convolutional decoder beside FlashVAE's, to compare: the published claim (better and faster than convolutions) in small.

What is fair: both decoders start from random weights, have as many parameters (within 5%), and see the same latents of the same frozen
encoder, the same loss, the same number of updates, the same optimiser and learning rate; one update of this stage is one of each. Neither is fine-tuned,
and FlashVAE's trained decoder is not used: it has had more updates. Not made equal: the work per update, in which the convolutions have the
larger share (`python -m benchmarks.vae_baseline` counts it and times decoding), and the encoder, which was trained with a decoder of
FlashVAE's kind. Clips are decoded whole here, which is the same as through FlashVAE's cache.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.flash_vae.conv3d import Conv3DDecoder, matching_width
from pikastream_jax.nn.layers import Functional, Params, functional, initial_params
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.flash_vae import PixelSettings, draw_faces, encode_sample, pixel_loss, stage_record
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.settings import Optimiser
from pikastream_jax.training.vae_adversarial import decoder_of
from pikastream_jax.training.vae_figures import HeldOutFaces
from pikastream_jax.weights.safetensors_io import restore_into

Decoders = dict[str, Callable[[Params, Float[Array, "b f r c z"]], Float[Array, "b t h w 3"]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(PixelSettings):
    """Settings of the stage."""

    updates: int = 1_800
    batch: int = 32
    latent_frames: int = 2
    crop: int = 64
    optimiser: Optimiser = OptimiserConfig(learning_rate=3e-3, decay="linear")


def conv3d(config: Config) -> Functional:
    """The convolutional decoder of as many parameters as the preset's own."""
    return functional(lambda rngs: Conv3DDecoder(config.flash_vae, matching_width(config.flash_vae), rngs=rngs))


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage. `init` names the `flash_vae` whose encoder makes the latents.

    Raises:
      ValueError: crops larger than the preset's pictures, or a preset for which no convolutional decoder is of equal size.
    """
    settings.require_fits("vae_conv3d", config)
    model, convolutions = functional(lambda rngs: FlashVAE(config.flash_vae, rngs=rngs)), conv3d(config)
    abstract = {"conv3d": convolutions.abstract, "flash_vae": decoder_of(model.abstract)}
    optimisers = {name: make_optimiser(tree, settings.optimiser, settings.updates) for name, tree in abstract.items()}

    def data() -> dict[str, Params]:
        return {"encoder": restore_into(model.abstract, load_weights(init["flash_vae"], "flash_vae"))}

    def initial_state() -> TrainState:
        k_conv, k_flash = jax.random.split(jax.random.key(seed))
        params = {
            "conv3d": initial_params(
                lambda rngs: Conv3DDecoder(config.flash_vae, matching_width(config.flash_vae), rngs=rngs), k_conv
            ),
            "flash_vae": decoder_of(initial_params(lambda rngs: FlashVAE(config.flash_vae, rngs=rngs), k_flash)),
        }
        opt_state = {name: optimiser.init(params[name]) for name, optimiser in optimisers.items()}
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, params, {})

    def decoders(encoder: Params) -> Decoders:
        return {
            "conv3d": lambda params, latents: convolutions.bind(params)(latents),
            "flash_vae": lambda params, latents: model.bind({**encoder, **params}).decode(latents),
        }

    def update(
        state: TrainState, key: Array, data: dict[str, Params], batch: dict[str, Any]
    ) -> tuple[TrainState, dict[str, Array]]:
        k_data, k_noise = jax.random.split(key)
        faces = draw_faces(k_data, settings, config)
        latents, _ = encode_sample(model.bind(data["encoder"]), faces.video, k_noise)
        parts, metrics = {}, {}
        for name, decode in decoders(data["encoder"]).items():

            def loss(params: Params, decode=decode) -> tuple[Array, dict[str, Array]]:
                return pixel_loss(decode(params, latents), faces, settings)

            (value, figures), gradient = jax.value_and_grad(loss, has_aux=True)(state.params[name])
            part = TrainState(state.step, state.params[name], state.opt_state[name], state.ema[name], {})
            parts[name] = part.descend(gradient, optimisers[name], settings.ema)
            metrics |= {f"loss_{name}": value, f"psnr_{name}": figures["psnr"]}
        new = dataclasses.replace(
            state,
            **{
                field: {name: getattr(part, field) for name, part in parts.items()}
                for field in ("params", "opt_state", "ema")
            },
        )
        return new, {"loss": metrics["loss_conv3d"], **metrics}

    held_out = HeldOutFaces(config)

    def reconstruct(name: str) -> Callable[[tuple[Params, Params], Array], Array]:
        @jax.jit
        def run(params: tuple[Params, Params], video: Array) -> Array:
            encoder, decoder = params
            return decoders(encoder)[name](decoder, model.bind(encoder).encode(video)[0])

        return run

    reconstructions = {name: reconstruct(name) for name in abstract}

    def evaluate(state: TrainState, data: dict[str, Params]) -> dict[str, float]:
        figures = {}
        for name, run in reconstructions.items():
            of_this = held_out.figures(run, (data["encoder"], state.ema[name]))
            figures |= {f"{figure}_{name}": value for figure, value in of_this.items()}
        return {"loss": figures["loss_conv3d"], **figures}

    def sample(state: TrainState, data: dict[str, Params], path: Path) -> None:
        held_out.draw(path, *(functools.partial(run, (data["encoder"], state.ema[name])) for name, run in reconstructions.items()))

    return Stage(
        name="vae_conv3d",
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        data=data,
        config=stage_record(config, settings),
        evaluate=evaluate,
        evaluate_every=settings.every(200),
        sample=sample,
        sample_every=500,
    )
