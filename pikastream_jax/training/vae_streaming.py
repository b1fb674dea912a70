"""FlashVAE, second: whole pictures, longer clips, decoded frame by frame through the rolling cache, as the stream does."""

import dataclasses
from pathlib import Path

from pikastream_jax.config import Config
from pikastream_jax.training.flash_vae import VAESettings, build_stage
from pikastream_jax.training.loop import Stage
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.settings import Optimiser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(VAESettings):
    """Settings of the stage."""

    updates: int = 300
    batch: int = 4
    latent_frames: int = 3
    crop: int = 256
    optimiser: Optimiser = OptimiserConfig(learning_rate=1.5e-3, warmup_steps=30, decay="linear")


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage. `init` names the `flash_vae` to start from."""
    return build_stage(config, "vae_streaming", seed, init, settings, streaming=True)
