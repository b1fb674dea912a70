"""FlashVAE's decoder alone, on halves of the picture: latents stay as they are, so clips and DiT stay valid while pictures improve."""

import dataclasses
from pathlib import Path

from pikastream_jax.config import Config
from pikastream_jax.measuring.estimator import SIZE
from pikastream_jax.training.flash_vae import VAESettings, build_stage
from pikastream_jax.training.loop import Stage
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.settings import Optimiser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(VAESettings):
    """Settings of the stage."""

    updates: int = 1_500
    batch: int = 6
    latent_frames: int = 3
    crop: int = 128
    kl_weight: float = 0.0
    motion_weight: float = 3.0
    optimiser: Optimiser = OptimiserConfig(learning_rate=2e-3, warmup_steps=50, decay="linear")
    region_weights: tuple[float, float] = (6.0, 6.0)
    faces: float = 0.5
    reading_weight: float = 0.1


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage. `init` names the `flash_vae` whose encoder is kept and, as `face_reader`, a run of `face_estimator`: one of another seed
    than the estimator that `evaluate` measures with.

    Raises:
      ValueError: the preset's pictures are not of the size that is read.
    """
    if (config.stream.height, config.stream.width) != (SIZE, SIZE):
        raise ValueError(f"vae_decoder is judged by a reader of {SIZE}x{SIZE}, preset {config.name} makes another size: use tiny")
    return build_stage(config, "vae_decoder", seed, init, settings, streaming=True, encoder=False)
