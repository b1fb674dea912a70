"""What FlashVAE's stages share: the loss, and the stage around it."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.measuring.estimator import FaceEstimator
from pikastream_jax.nn.layers import Functional, Params, functional, initial_params
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.face_estimator import face_misreading
from pikastream_jax.training.faces import FaceBatch, face_batch
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.losses import motion_loss, psnr, reconstruction_loss, region_weights
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import make_optimiser
from pikastream_jax.training.pictures import save_rows
from pikastream_jax.training.settings import StageSettings
from pikastream_jax.weights.safetensors_io import restore_into

HELD_OUT_SEED = 1_000_003  # identities and motions of the held-out batches; training keys are folded from the run's seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAESettings(StageSettings):
    """What differs between the stages; a row of a batch is a clip."""

    latent_frames: int
    """Length of a clip."""
    crop: int
    """Pixels each way."""
    motion_weight: float = 6.0
    """Of the error of the change from frame to frame."""
    kl_weight: float = 5e-5
    region_weights: tuple[float, float] = (6.0, 2.0)
    """What the boxes of mouth and eyes add to every pixel's weight of 1."""
    faces: float = 0.0
    """Share of crops that hold mouth and eyes, see `face_batch`."""
    reading_weight: float = 0.0
    """Of what a reader of pixels misreads, see `face_misreading`."""
    ema: float = 0.995

    def __post_init__(self):
        super().__post_init__()
        if self.latent_frames < 1 or self.crop < 1:
            raise ValueError(f"latent_frames {self.latent_frames} and crop {self.crop} must be at least 1")


def _decode(vae: FlashVAE, latents: Float[Array, "b f r c z"], streaming: bool) -> Float[Array, "b t h w 3"]:
    if not streaming:
        return vae.decode(latents)
    b, f, rows, columns, _ = latents.shape
    cache = vae.init_decode_cache(b, rows, columns)
    frames = []
    for index in range(f):
        cache, out = vae.decode_step(cache, latents[:, index])
        frames.append(out)
    return jnp.concatenate(frames, axis=1)


def vae_loss(
    model: Functional, params: Params, batch: FaceBatch, key: Array, stage: VAESettings, *, streaming: bool, encoder: bool = True, reader: FaceEstimator | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Reconstruction from a sampled latent, its motion, the KL divergence to a unit Gaussian, and what the `reader` misreads.

    Args:
      streaming: decode frame by frame through the cache, as at inference.
      encoder: False leaves the encoder as it is, and with it the latents that the DiT knows.
    """
    vae = model.bind(params)
    video = batch.video
    mean, log_variance = vae.encode(video)
    if not encoder:
        mean, log_variance = jax.lax.stop_gradient((mean, log_variance))
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    output = _decode(vae, latents, streaming)
    h, w = video.shape[2:4]
    weight = region_weights(batch.boxes, h, w, stage.region_weights, batch.origin[:, None])
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
    reconstruction = reconstruction_loss(output, video, weight)
    motion = motion_loss(output, video, weight)
    loss = reconstruction + stage.motion_weight * motion + stage.kl_weight * kl
    parts = {"reconstruction": reconstruction, "motion": motion, "kl": kl, "psnr": psnr(jnp.mean((output - video) ** 2))}
    if reader is not None:
        parts["reading"] = face_misreading(reader, output, batch)
        loss = loss + stage.reading_weight * parts["reading"]
    return loss, parts


def build_stage(
    config: Config, name: str, seed: int, init: dict[str, Path], stage: VAESettings, *, streaming: bool, encoder: bool = True
) -> Stage:
    """A stage of FlashVAE, from `init["flash_vae"]` or from nothing.

    Raises:
      ValueError: crops larger than the preset's pictures.
    """
    if stage.crop > min(config.stream.height, config.stream.width):
        raise ValueError(f"{name}: crop {stage.crop} is larger than the {config.stream.height}x{config.stream.width} pictures of {config.name}")
    size = config.stream.height
    clip_frames = stage.latent_frames * config.flash_vae.temporal_stride

    def build_model(rngs):
        return FlashVAE(config.flash_vae, rngs=rngs)

    model = functional(build_model)
    optimiser = make_optimiser(model.abstract, stage.optimiser, stage.updates)

    def initial_state() -> TrainState:
        if "flash_vae" in init:
            params = restore_into(model.abstract, load_weights(init["flash_vae"]))
        else:
            params = initial_params(build_model, jax.random.key(seed))
        return TrainState.start(params, optimiser)

    def update(state: TrainState, key: Array, data: dict, batch: dict) -> tuple[TrainState, dict]:
        k_data, k_noise = jax.random.split(key)
        shown = split_batch(face_batch(k_data, stage.batch, clip_frames, size, stage.crop, stage.faces))
        reader = face_reader.bind(data["face_reader"]) if stage.reading_weight else None
        (loss, metrics), gradient = jax.value_and_grad(
            lambda p: vae_loss(model, p, shown, k_noise, stage, streaming=streaming, encoder=encoder, reader=reader), has_aux=True
        )(state.params)
        return state.descend(gradient, optimiser, stage.ema), {"loss": loss, **metrics}

    face_reader = functional(lambda rngs: FaceEstimator(rngs=rngs))

    @functools.cache
    def data() -> dict[str, Params]:
        if not stage.reading_weight:
            return {}
        return {"face_reader": restore_into(face_reader.abstract, load_weights(init["face_reader"]))}

    held_out = functools.cache(lambda: jax.jit(render_held_out)(jax.random.key(HELD_OUT_SEED)))

    def render_held_out(key: Array) -> FaceBatch:
        return face_batch(key, 8, 2 * config.flash_vae.temporal_stride, size, size)

    @jax.jit
    def reconstruct(params, video):
        vae = model.bind(params)
        return vae.decode(vae.encode(video)[0])

    def evaluate(state: TrainState) -> dict[str, float]:
        batch = held_out()
        video = batch.video
        output = reconstruct(state.ema, video)
        error = np.asarray((jnp.clip(output, -1, 1) - video) ** 2)
        mouth, eyes = (np.asarray(region_weights(batch.boxes[..., i : i + 1, :], size, size, (1.0,))) > 1.5 for i in (0, 1))
        motion = {name: np.diff(np.asarray(v), axis=1) for name, v in (("out", output), ("in", video))}
        # How much of the lips' true motion the output repeats: 1 is all of it, 0 a mouth that stands still.
        lips_moving = mouth[:, 1:]
        kept = float((motion["out"][lips_moving] * motion["in"][lips_moving]).sum() / (motion["in"][lips_moving] ** 2).sum())
        whole = float(psnr(error.mean()))
        parts = {f"psnr_{name}": float(psnr(error[box].mean())) for name, box in (("mouth", mouth), ("eyes", eyes))}
        return {"loss": float(np.sqrt(error.mean())), "psnr": whole, **parts, "mouth_motion_kept": kept}

    def sample(state: TrainState, path: Path) -> None:
        video = held_out().video
        output = reconstruct(state.ema, video)
        save_rows(path, [video[:, 0], output[:, 0], video[:, -1], output[:, -1]])

    return Stage(
        name=name,
        total_steps=stage.updates,
        seed=seed,
        init=initial_state,
        update=update,
        data=data,
        config={
            "preset": config.name,
            "flash_vae": dataclasses.asdict(config.flash_vae),
            "stage": stage.record(),
        },
        evaluate=evaluate,
        evaluate_every=200,
        sample=sample,
        sample_every=500,
    )
