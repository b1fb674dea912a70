"""Presets by name."""

import dataclasses
from pathlib import Path
from typing import Any

from configs.base_1_3b import base_1_3b
from configs.nano import FLAGS as NANO_FLAGS
from configs.nano import INIT as NANO_INIT
from configs.nano import LEFT_OUT as NANO_LEFT_OUT
from configs.nano import SETTINGS as NANO_SETTINGS
from configs.nano import nano
from configs.pikastream_9b import pikastream_9b
from configs.tiny import FLAGS as TINY_FLAGS
from configs.tiny import SETTINGS as TINY_SETTINGS
from configs.tiny import tiny
from pikastream_jax.config import Config

PRESETS = {"base_1_3b": base_1_3b, "nano": nano, "pikastream_9b": pikastream_9b, "tiny": tiny}


def preset(name: str, **stream) -> Config:
    """The preset called `name`.

    Args:
      stream: fields of `StreamConfig` that shall differ: the same models, run in another way.

    Raises:
      ValueError: no preset has that name, or the fields' values make no sense.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; choose one of {', '.join(sorted(PRESETS))}")
    config = PRESETS[name]()
    return dataclasses.replace(config, stream=dataclasses.replace(config.stream, **stream))


def stage_settings(name: str) -> dict[str, dict[str, Any]]:
    """For each stage of the training what a preset wants different from the stage's own settings."""
    return {"nano": NANO_SETTINGS, "tiny": TINY_SETTINGS}.get(name, {})


def stage_init(name: str) -> dict[str, dict[str, Path]]:
    """For each stage of a preset what it starts from where nothing else is named with --init."""
    return {"nano": NANO_INIT}.get(name, {})


def left_out(name: str) -> tuple[str, ...]:
    """Steps of the recipe that a preset goes without."""
    return {"nano": NANO_LEFT_OUT}.get(name, ())


def step_flags(name: str) -> dict[str, tuple[str, ...]]:
    """Flags of single steps of a preset's recipe, by the run that a step makes: two steps may be of one stage."""
    return {"nano": NANO_FLAGS, "tiny": TINY_FLAGS}.get(name, {})
