"""Presets by name."""

from configs.tiny import tiny
from pikastream_jax.config import Config

PRESETS = {"tiny": tiny}


def preset(name: str) -> Config:
    """The preset called `name`.

    Raises:
      ValueError: no preset has that name.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()
