"""FlashVAE's stages: low-resolution pre-training on crops, streaming at full size through the decoder's rolling cache, then the
decoder alone."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.measuring.estimator import SIZE, FaceEstimator
from pikastream_jax.nn.layers import Functional, Params, functional, initial_params
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.face_estimator import face_misreading
from pikastream_jax.training.faces import FaceBatch, face_batch
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.losses import motion_loss, psnr, reconstruction_loss, region_weights
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.pictures import save_rows
from pikastream_jax.weights.safetensors_io import restore_into

HELD_OUT_SEED = 1_000_003  # identities and motions of the held-out batches; training keys are folded from the run's seed


@dataclasses.dataclass(frozen=True)
class VAEStageConfig:
    """What differs between the stages."""

    batch: int
    latent_frames: int  # in a clip
    crop: int  # pixels each way
    streaming: bool  # decode frame by frame through the cache, as at inference
    encoder: bool  # False leaves the encoder as it is, and with it the latents that the DiT knows
    kl_weight: float
    motion_weight: float
    updates: int
    optimiser: OptimiserConfig
    region_weights: tuple[float, float] = (6.0, 2.0)  # what the boxes of mouth and eyes add to every pixel's weight of 1
    faces: float = 0.0  # share of crops that hold mouth and eyes, see `face_batch`
    reading_weight: float = 0.0  # of what a reader of pixels misreads, see `face_misreading`
    ema: float = 0.995


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
    model: Functional, params: Params, batch: FaceBatch, key: Array, stage: VAEStageConfig, reader: FaceEstimator | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Reconstruction from a sampled latent, its motion, the KL divergence to a unit Gaussian, and what the `reader` misreads."""
    vae = model.bind(params)
    video = batch.video
    mean, log_variance = vae.encode(video)
    if not stage.encoder:
        mean, log_variance = jax.lax.stop_gradient((mean, log_variance))
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    output = _decode(vae, latents, stage.streaming)
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


def _build(config: Config, name: str, stage: VAEStageConfig, seed: int, init: dict[str, Path]) -> Stage:
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

    def update(state: TrainState, key: Array, data: dict) -> tuple[TrainState, dict]:
        k_data, k_noise = jax.random.split(key)
        batch = split_batch(face_batch(k_data, stage.batch, clip_frames, size, stage.crop, stage.faces))
        reader = face_reader.bind(data["face_reader"]) if stage.reading_weight else None
        (loss, metrics), gradient = jax.value_and_grad(
            lambda p: vae_loss(model, p, batch, k_noise, stage, reader), has_aux=True
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
            "stage": {name: value for name, value in dataclasses.asdict(stage).items() if name != "updates"},
        },
        evaluate=evaluate,
        evaluate_every=200,
        sample=sample,
        sample_every=500,
    )


def build_low_res(config: Config, seed: int, init: dict[str, Path], updates: int = 1_800) -> Stage:
    """Crops of a quarter of the picture's side, mostly mouths and eyes, one latent frame each: most of the learning, cheaply."""
    stage = VAEStageConfig(
        batch=64,
        latent_frames=1,
        crop=config.stream.height // 4,
        streaming=False,
        encoder=True,
        kl_weight=5e-5,
        motion_weight=6.0,
        updates=updates,
        optimiser=OptimiserConfig(learning_rate=3e-3, warmup_steps=100, decay="linear"),
    )
    return _build(config, "flash_vae_low_res", stage, seed, init)


def build_streaming(config: Config, seed: int, init: dict[str, Path], updates: int = 300) -> Stage:
    """Whole pictures, longer clips, decoded frame by frame with the cache, as the stream does."""
    stage = VAEStageConfig(
        batch=4,
        latent_frames=3,
        crop=config.stream.height,
        streaming=True,
        encoder=True,
        kl_weight=5e-5,
        motion_weight=6.0,
        updates=updates,
        optimiser=OptimiserConfig(learning_rate=1.5e-3, warmup_steps=30, decay="linear"),
    )
    return _build(config, "flash_vae_streaming", stage, seed, init)


def build_decoder(config: Config, seed: int, init: dict[str, Path], updates: int = 1_500) -> Stage:
    """The decoder alone, on halves of the picture: latents stay as they are, so clips and DiT stay valid while pictures improve.

    `init` names the `flash_vae` whose encoder is kept and, as `face_reader`, a run of `face_estimator`: one of another seed than the
    estimator that `evaluate` measures with.

    Raises:
      ValueError: the preset's pictures are not of the size that is read.
    """
    if (config.stream.height, config.stream.width) != (SIZE, SIZE):
        raise ValueError(f"flash_vae_decoder is judged by a reader of {SIZE}x{SIZE}, preset {config.name} makes another size: use tiny")
    stage = VAEStageConfig(
        batch=6,
        latent_frames=3,
        crop=config.stream.height // 2,
        streaming=True,
        encoder=False,
        kl_weight=0.0,
        motion_weight=3.0,
        updates=updates,
        optimiser=OptimiserConfig(learning_rate=2e-3, warmup_steps=50, decay="linear"),
        region_weights=(6.0, 6.0),
        faces=0.5,
        reading_weight=0.1,
    )
    return _build(config, "flash_vae_decoder", stage, seed, init)
