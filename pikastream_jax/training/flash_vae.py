"""What FlashVAE's stages share: the clips, the losses, and the stage that trains encoder and decoder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.nn.layers import Functional, Params, functional, initial_params
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.faces import FaceBatch, face_batch
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.losses import motion_loss, psnr, reconstruction_loss, region_weights
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import make_optimiser
from pikastream_jax.training.settings import StageSettings
from pikastream_jax.training.vae_figures import HeldOutFaces
from pikastream_jax.weights.safetensors_io import restore_into


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelSettings(StageSettings):
    """What is shown to a decoder and what it pays for; a row of a batch is a clip."""

    latent_frames: int
    """Length of a clip."""
    crop: int
    """Pixels each way."""
    motion_weight: float = 6.0
    """Of the error of the change from frame to frame."""
    region_weights: tuple[float, float] = (6.0, 2.0)
    """What the boxes of mouth and eyes add to every pixel's weight of 1."""
    faces: float = 0.0
    """Share of crops that hold mouth and eyes, see `face_batch`."""
    ema: float = 0.995

    def __post_init__(self):
        super().__post_init__()
        if self.latent_frames < 1 or self.crop < 1:
            raise ValueError(f"latent_frames {self.latent_frames} and crop {self.crop} must be at least 1")

    def require_fits(self, stage: str, config: Config) -> None:
        """Raises ValueError where the crops are larger than the preset's pictures."""
        h, w = config.stream.height, config.stream.width
        if self.crop > min(h, w):
            raise ValueError(f"{stage}: crop {self.crop} is larger than the {h}x{w} pictures of {config.name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAESettings(PixelSettings):
    """Encoder and decoder together."""

    kl_weight: float = 5e-5


def draw_faces(key: Array, settings: PixelSettings, config: Config) -> FaceBatch:
    """An update's clips."""
    frames = settings.latent_frames * config.flash_vae.temporal_stride
    return split_batch(face_batch(key, settings.batch, frames, config.stream.height, settings.crop, settings.faces))


def encode_sample(
    vae: FlashVAE, video: Float[Array, "b t h w 3"], key: Array
) -> tuple[Float[Array, "b f r c z"], Float[Array, ""]]:
    """A sample of the latents, and the mean KL divergence of their distribution to a unit Gaussian."""
    mean, log_variance = vae.encode(video)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    return latents, 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)


def decode_streaming(vae: FlashVAE, latents: Float[Array, "b f r c z"]) -> Float[Array, "b t h w 3"]:
    """Frame by frame through the rolling cache, as at inference."""
    b, f, rows, columns, _ = latents.shape
    cache = vae.init_decode_cache(b, rows, columns)
    frames = []
    for index in range(f):
        cache, out = vae.decode_step(cache, latents[:, index])
        frames.append(out)
    return jnp.concatenate(frames, axis=1)


def pixel_loss(
    output: Float[Array, "b t h w 3"], faces: FaceBatch, settings: PixelSettings
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Reconstruction and motion against the truth, mouths and eyes counting more."""
    video = faces.video
    weight = region_weights(faces.boxes, *video.shape[2:4], settings.region_weights, faces.origin[:, None])
    reconstruction, motion = reconstruction_loss(output, video, weight), motion_loss(output, video, weight)
    parts = {"reconstruction": reconstruction, "motion": motion, "psnr": psnr(jnp.mean((output - video) ** 2))}
    return reconstruction + settings.motion_weight * motion, parts


def vae_loss(
    model: Functional, params: Params, faces: FaceBatch, key: Array, settings: VAESettings, *, streaming: bool
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`pixel_loss` from a sampled latent, and the KL divergence of the latents to a unit Gaussian.

    Args:
      streaming: decode frame by frame through the cache, as at inference.
    """
    vae = model.bind(params)
    latents, kl = encode_sample(vae, faces.video, key)
    output = decode_streaming(vae, latents) if streaming else vae.decode(latents)
    loss, parts = pixel_loss(output, faces, settings)
    return loss + settings.kl_weight * kl, {**parts, "kl": kl}


def build_stage(
    config: Config, name: str, seed: int, init: dict[str, Path], settings: VAESettings, *, streaming: bool
) -> Stage:
    """A stage that trains encoder and decoder, from `init["flash_vae"]` or from nothing.

    Raises:
      ValueError: crops larger than the preset's pictures.
    """
    settings.require_fits(name, config)

    def build_model(rngs):
        return FlashVAE(config.flash_vae, rngs=rngs)

    model = functional(build_model)
    optimiser = make_optimiser(model.abstract, settings.optimiser, settings.updates)

    def initial_state() -> TrainState:
        if "flash_vae" in init:
            params = restore_into(model.abstract, load_weights(init["flash_vae"], "flash_vae"))
        else:
            params = initial_params(build_model, jax.random.key(seed))
        return TrainState.start(params, optimiser)

    def update(state: TrainState, key: Array, data: dict, batch: dict) -> tuple[TrainState, dict]:
        k_data, k_noise = jax.random.split(key)
        faces = draw_faces(k_data, settings, config)
        (loss, metrics), gradient = jax.value_and_grad(
            lambda params: vae_loss(model, params, faces, k_noise, settings, streaming=streaming), has_aux=True
        )(state.params)
        return state.descend(gradient, optimiser, settings.ema), {"loss": loss, **metrics}

    held_out, reconstruct = HeldOutFaces(config), reconstruction(model)
    return Stage(
        name=name,
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        config=stage_record(config, settings),
        evaluate=lambda state, data: held_out.figures(reconstruct, state.ema),
        evaluate_every=settings.every(200),
        sample=lambda state, data, path: held_out.draw(path, lambda video: reconstruct(state.ema, video)),
        sample_every=500,
    )


def reconstruction(model: Functional) -> Callable[[Params, Float[Array, "b t h w 3"]], Float[Array, "b t h w 3"]]:
    """Parameters and video -> the video that FlashVAE makes of its latents' means."""

    @jax.jit
    def reconstruct(params: Params, video: Array) -> Array:
        vae = model.bind(params)
        return vae.decode(vae.encode(video)[0])

    return reconstruct


def stage_record(config: Config, settings: StageSettings) -> dict[str, Any]:
    """What a run of FlashVAE's stages is continued with."""
    return {"preset": config.name, "flash_vae": dataclasses.asdict(config.flash_vae), "stage": settings.record()}
