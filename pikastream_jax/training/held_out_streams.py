"""What a student makes of held-out clips while it is trained: the same streams from the same noise, every time."""

import functools
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.nn.layers import Params
from pikastream_jax.streaming.step import Models
from pikastream_jax.training.dit_data import ClipWindows, DiTBatch, prepare_batch, windows
from pikastream_jax.training.roll_out import Script, roll_out
from pikastream_jax.training.training_form import Form, training_models


class HeldOutStreams:
    """Roll-outs of the first held-out clips, each with its own prompt and face throughout, always from the same noise."""

    def __init__(self, config: Config, clips: Path, frames: int, count: int):
        self.config, self.models = config, training_models(Models.of(config), Form())
        self.windows = functools.cache(lambda: windows(config, clips, "held_out", count, frames, None)[0])

    def roll_out(self, params: Params, data: dict[str, Any], batch: ClipWindows) -> tuple[DiTBatch, Float[Array, "b f r c z"]]:
        """The clips and what a denoiser makes in their place; inside jit, `batch` being `windows()`."""
        rows = prepare_batch(self.config, data, batch, jax.random.key(0), train=False)
        noise = jax.random.normal(jax.random.key(1), rows.latents.shape)
        return rows, roll_out(self.models, params, Script.of(rows, self.config.stream.chunk), noise)[1]
