"""Supervised fine-tuning: the loss of the pre-training on the best quarter of the clips, at a lower rate and with a longer average, on whole pictures.

What is best is measured when clips are made (`clips.MEASURES`): sharp through FlashVAE, a calm head that faces the viewer, a complete caption,
clear speech. The published system keeps 2 of 10 million clips for this stage, by stricter thresholds on aesthetics and lip sync.

`dit_pretrain` sees parts of pictures, in which no two tokens are as far apart as the first and the last row are: those distances are learned from here on.
"""

import dataclasses
from pathlib import Path

from pikastream_jax.config import Config
from pikastream_jax.training import dit_pretrain
from pikastream_jax.training.loop import Stage
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.settings import Optimiser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(dit_pretrain.Settings):
    """Settings of the stage."""

    updates: int = 500
    ema: float = 0.995
    optimiser: Optimiser = OptimiserConfig(learning_rate=5e-4, warmup_steps=20, decay="linear")


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage. `init` names `clips`, `reader`, `flash_vae` (for pictures) and `denoiser`, the pre-trained model."""
    return dit_pretrain.flow_matching_stage(config, "dit_sft", seed, init, settings, curated=True, crop=1.0)
