"""FlashVAE's decoder alone, against a discriminator: sharper pictures, the same latents, so that clips and DiT stay valid.

The encoder is frozen; clips are decoded frame by frame through the rolling cache, as the stream does. The decoder pays what it paid before, and

    weight x balance x -mean D(decoded),   balance = |gradient of the losses against the truth| / |gradient of -mean D|

with both gradients taken at the decoder's last layer (VQGAN, equation 7), so that `weight` says how much of a say the discriminator has, whatever the
scale of its answers. The discriminator learns by the hinge loss and R1 (`training/adversarial.py`). In the first updates it learns alone: what
an untrained one says is noise. Where a network that reads faces is at hand (`face_reader`, and the pictures have the size it reads), the decoder
also pays for every difference in what is read: mouths and eyes are a few pixels wide, and errors of pixels are content with soft ones.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.flash_vae.discriminator import SPATIAL_STRIDE, TEMPORAL_STRIDE, Discriminator
from pikastream_jax.flash_vae.model import DECODER_PARTS
from pikastream_jax.measuring.estimator import SIZE, FaceEstimator
from pikastream_jax.nn.layers import Params, functional, initial_params
from pikastream_jax.training.adversarial import discriminator_hinge, generator_hinge, gradient_balance, r1_penalty
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.face_estimator import face_misreading
from pikastream_jax.training.faces import FaceBatch
from pikastream_jax.training.flash_vae import (
    PixelSettings,
    decode_streaming,
    draw_faces,
    encode_sample,
    pixel_loss,
    reconstruction,
    stage_record,
)
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.settings import Optimiser
from pikastream_jax.training.vae_figures import HeldOutFaces
from pikastream_jax.weights.safetensors_io import restore_into


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(PixelSettings):
    """Settings of the stage."""

    updates: int = 1_500
    batch: int = 6
    latent_frames: int = 3
    crop: int = 128
    motion_weight: float = 3.0
    optimiser: Optimiser = OptimiserConfig(learning_rate=1e-3, warmup_steps=50, decay="linear")
    region_weights: tuple[float, float] = (6.0, 6.0)
    faces: float = 0.5
    reading_weight: float = 0.1
    """Of what a reader of pixels misreads, see `face_misreading`; without a `face_reader` nothing is read."""
    discriminator: OptimiserConfig = OptimiserConfig(
        learning_rate=5e-4, warmup_steps=0, final_fraction=1.0, betas=(0.5, 0.9), muon=False
    )
    discriminator_dim: int = 32
    """Channels after its first convolution."""
    alone: int = 100
    """First updates, in which only the discriminator learns."""
    adversarial_weight: float = 0.3
    """Length of the discriminator's share of the gradient, that of the truth being 1; 0 trains without it, to compare."""
    largest_balance: float = 10.0
    """No balance above it."""
    r1_weight: float = 1.0
    r1_every: int = 8
    """Updates from one gradient penalty to the next; its weight is multiplied by as much."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("discriminator_dim", "r1_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("adversarial_weight", "largest_balance", "r1_weight", "reading_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0")
        if not 0 <= self.alone < self.updates:
            raise ValueError(
                f"alone {self.alone} must lie in 0 to {self.updates - 1}, below updates {self.updates}, or the decoder never learns"
            )
        if self.crop % SPATIAL_STRIDE:
            raise ValueError(f"crop {self.crop} must be a multiple of {SPATIAL_STRIDE}, the discriminator's stride")


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage. `init` names the `flash_vae` whose encoder is kept and may name, as `face_reader`, a run of `face_estimator`: one of
    another seed than the estimator that `evaluate` measures with.

    Raises:
      ValueError: crops larger than the preset's pictures, or a stride in time that the discriminator cannot take.
    """
    settings.require_fits("vae_adversarial", config)
    stride = config.flash_vae.temporal_stride
    if settings.latent_frames * stride % TEMPORAL_STRIDE:
        raise ValueError(
            f"vae_adversarial: {settings.latent_frames} latent frames of {stride} video frames are not a multiple of {TEMPORAL_STRIDE}"
        )
    reads = (
        settings.reading_weight > 0
        and "face_reader" in init
        and (config.stream.height, config.stream.width) == (SIZE, SIZE)
    )
    model = functional(lambda rngs: FlashVAE(config.flash_vae, rngs=rngs))
    face_reader = functional(lambda rngs: FaceEstimator(rngs=rngs))
    build_discriminator = lambda rngs: Discriminator(settings.discriminator_dim, rngs=rngs)  # noqa: E731
    discriminator = functional(build_discriminator)
    optimiser = make_optimiser(decoder_of(model.abstract), settings.optimiser, settings.updates - settings.alone)
    opponent = make_optimiser(discriminator.abstract, settings.discriminator, settings.updates)

    def initial_state() -> TrainState:
        params = restore_into(model.abstract, load_weights(init["flash_vae"], "flash_vae"))
        judge = initial_params(build_discriminator, jax.random.key(seed))
        start = TrainState.start(params, optimiser)
        return dataclasses.replace(
            start,
            opt_state=optimiser.init(decoder_of(params)),
            extra={"discriminator": judge, "opt_state": opponent.init(judge)},
        )

    def data() -> dict[str, Params]:
        return {"face_reader": restore_into(face_reader.abstract, load_weights(init["face_reader"]))} if reads else {}

    def discriminator_loss(judge: Params, real: Array, fake: Array, step: Array) -> tuple[Array, dict[str, Array]]:
        answer = discriminator.bind(judge)
        of_real, of_fake = answer(real), answer(fake)
        hinge = discriminator_hinge(of_real, of_fake)
        r1 = jax.lax.cond(step % settings.r1_every == 0, lambda: r1_penalty(answer, real), lambda: jnp.zeros(()))
        loss = hinge + settings.r1_weight * settings.r1_every * r1
        told = jnp.mean(of_real > 0) / 2 + jnp.mean(of_fake < 0) / 2
        return loss, {"discriminator": hinge, "told_apart": told}

    def update(
        state: TrainState, key: Array, data: dict[str, Params], batch: dict[str, Any]
    ) -> tuple[TrainState, dict[str, Array]]:
        k_data, k_noise = jax.random.split(key)
        faces = draw_faces(k_data, settings, config)
        latents, _ = encode_sample(model.bind(state.params), faces.video, k_noise)
        decoder = decoder_of(state.params)
        output, pull = jax.vjp(lambda part: decode_streaming(model.bind({**state.params, **part}), latents), decoder)

        judge = state.extra["discriminator"]
        (_, judged), gradient = jax.value_and_grad(discriminator_loss, has_aux=True)(
            judge, faces.video, jax.lax.stop_gradient(output), state.step
        )
        opponent_part = TrainState(state.step, judge, state.extra["opt_state"], judge, {}).descend(
            gradient, opponent, 0.0
        )
        judge = opponent_part.params  # the decoder meets the discriminator that has just learned

        reader = face_reader.bind(data["face_reader"]) if reads else None
        (loss, parts), towards_truth = jax.value_and_grad(truth_loss, has_aux=True)(output, faces, settings, reader)
        adversarial, towards_real = jax.value_and_grad(lambda video: generator_hinge(discriminator.bind(judge)(video)))(
            output
        )
        # Of these two only the last layer is used: the compiler leaves the rest of the backward pass out.
        last = [last_layer(pull(direction)[0]) for direction in (towards_truth, towards_real)]
        balance = gradient_balance(*last, settings.largest_balance)

        def learn() -> tuple[Params, Any, Params]:
            (gradient,) = pull(towards_truth + settings.adversarial_weight * balance * towards_real)
            part = TrainState(state.step - settings.alone, decoder, state.opt_state, decoder_of(state.ema), {})
            part = part.descend(gradient, optimiser, settings.ema)
            return part.params, part.opt_state, part.ema

        rest = lambda: (decoder, state.opt_state, decoder_of(state.ema))  # noqa: E731
        params, opt_state, ema = jax.lax.cond(state.step >= settings.alone, learn, rest)
        new = dataclasses.replace(
            state,
            params={**state.params, **params},
            opt_state=opt_state,
            ema={**state.ema, **ema},
            extra={"discriminator": judge, "opt_state": opponent_part.opt_state},
        )
        return new, {"loss": loss, **parts, "adversarial": adversarial, "balance": balance, **judged}

    held_out, reconstruct = HeldOutFaces(config), reconstruction(model)
    return Stage(
        name="vae_adversarial",
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        data=data,
        config={**stage_record(config, settings), "face_reader": reads},
        evaluate=lambda state, data: held_out.figures(reconstruct, state.ema),
        evaluate_every=settings.every(100),
        sample=lambda state, data, path: held_out.draw(path, lambda video: reconstruct(state.ema, video)),
        sample_every=500,
    )


def truth_loss(
    output: Float[Array, "b t h w 3"], faces: FaceBatch, settings: Settings, reader: FaceEstimator | None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What the decoder pays for differences from the truth: in pixels, and in what a `reader` of pixels reads."""
    loss, parts = pixel_loss(output, faces, settings)
    if reader is None:
        return loss, parts
    reading = face_misreading(reader, output, faces)
    return loss + settings.reading_weight * reading, {**parts, "reading": reading}


def decoder_of(params: dict[str, Any]) -> dict[str, Any]:
    """The part of FlashVAE's parameters that makes video of latents."""
    return {name: params[name] for name in DECODER_PARTS}


def last_layer(decoder: dict[str, Any]) -> Array:
    """The last matrix before the pixels."""
    return decoder["upsampler"]["head"]["down"]["kernel"]
