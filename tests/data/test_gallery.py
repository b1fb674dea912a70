"""The shipped avatars are what the renderer draws for their numbers."""

from pathlib import Path

import numpy as np
from PIL import Image

from pikastream_jax.data.gallery import AVATARS, portraits
from pikastream_jax.streaming.package import ASSETS


def test_every_avatar_is_shipped_at_the_models_size():
    files = {path.stem: path for path in Path(ASSETS / "avatars").glob("*.png")}
    assert set(files) == set(AVATARS) and len(files) >= 12
    for path in files.values():
        assert Image.open(path).size == (256, 256)


def test_an_avatar_can_be_redrawn():
    name = next(iter(AVATARS))
    drawn = np.asarray(portraits(np.array([AVATARS[name]]), 256))[0]
    shipped = np.asarray(Image.open(ASSETS / "avatars" / f"{name}.png"))
    assert np.abs(drawn.astype(int) - shipped).max() <= 2, "rounding may differ between machines"
