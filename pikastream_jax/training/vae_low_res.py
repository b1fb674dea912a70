"""FlashVAE, first: crops of a quarter of the picture's side, mostly mouths and eyes, one latent frame each: most of the learning, cheaply."""

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

    updates: int = 1_800
    batch: int = 64
    latent_frames: int = 1
    crop: int = 64
    optimiser: Optimiser = OptimiserConfig(learning_rate=3e-3, decay="linear")


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage; it starts from nothing, or from the `flash_vae` that `init` names."""
    return build_stage(config, "vae_low_res", seed, init, settings, streaming=False)
