"""Portraits of procedural people: the avatars that are shipped, and the grid of faces in the documents.

`python -m pikastream_jax.data.gallery --out pikastream_jax/assets/avatars` draws the avatars,
`python -m pikastream_jax.data.gallery --grid docs/faces.webp` the grid. Both are a function of `SEED` and of the numbers
below alone. No stage of training meets these people: its keys are folded out of the seed given to `train.py` (small
numbers for the shipped weights), not out of `SEED`.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Int, UInt8
from PIL import Image

from pikastream_jax.data.face import FaceState, neutral_state, render, sample_identity

SEED = 424_242
SIZE = 256  # pixels of an avatar
# Name -> number of the person, chosen by eye out of the first 72 for variety. The first is what serve.py shows by default.
AVATARS = {
    "ada": 35, "bo": 2, "chioma": 15, "diego": 26, "emre": 17, "fumiko": 21, "grace": 23, "hana": 52, "imani": 70,
    "jonas": 66, "kofi": 62, "lena": 42, "maya": 71, "noor": 10, "omar": 68, "priya": 27, "rosa": 48, "walter": 14,
}  # fmt: skip
GRID_COLUMNS, GRID_SIZE = 6, 160  # pixels of a face in the grid


def portrait_state(key: Array) -> FaceState:
    """How a person sits for a portrait: eyes open, mouth closed, head turned a little, a hint of a smile."""
    limits = {"yaw": 0.10, "pitch": 0.05, "roll": 0.05, "gaze_x": 0.10, "gaze_y": 0.06}
    k_pose, k_smile = jax.random.split(key)
    drawn = jax.random.uniform(k_pose, (len(limits),), minval=-1.0, maxval=1.0)
    pose = {name: drawn[i] * limit for i, (name, limit) in enumerate(limits.items())}
    return dataclasses.replace(neutral_state(), smile=jax.random.uniform(k_smile, minval=0.15, maxval=0.5), **pose)


def portraits(numbers: Int[np.ndarray, " n"], size: int) -> UInt8[np.ndarray, "n size size 3"]:
    """One picture of each numbered person.

    Args:
      numbers: which people of `SEED`, each from 0.
      size: pixels each way.
    """

    @jax.jit
    def draw(number):
        k_identity, k_state = jax.random.split(jax.random.fold_in(jax.random.key(SEED), number))
        picture = render(sample_identity(k_identity), portrait_state(k_state), size=size)
        return jnp.round((picture + 1.0) * 127.5).astype(jnp.uint8)

    return np.stack([np.asarray(draw(jnp.int32(number))) for number in numbers])


def tile(pictures: UInt8[np.ndarray, "n h w 3"], columns: int) -> UInt8[np.ndarray, "rows_h columns_w 3"]:
    """Pictures in rows of `columns`; an unfinished last row is filled with white."""
    n, h, w, _ = pictures.shape
    rows = -(-n // columns)
    canvas = np.full((rows * columns, h, w, 3), 255, np.uint8)
    canvas[:n] = pictures
    return canvas.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draw procedural people."""

    out: Path | None = None
    """Folder for the avatars, a NAME.png each."""
    grid: Path | None = None
    """Picture of many people, in rows of 6."""
    people: int = 18
    """How many people are in the grid."""

    def __post_init__(self):
        if self.out is None and self.grid is None:
            raise ValueError("nothing to draw: give --out FOLDER, --grid FILE, or both")
        if self.people < 1:
            raise ValueError(f"--people {self.people} must be at least 1")


def main() -> None:
    arguments = tyro.cli(Arguments)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        pictures = portraits(np.fromiter(AVATARS.values(), int), SIZE)
        for name, picture in zip(AVATARS, pictures, strict=True):
            Image.fromarray(picture).save(arguments.out / f"{name}.png", optimize=True)
        print(f"{len(AVATARS)} avatars in {arguments.out}")
    if arguments.grid is not None:
        arguments.grid.parent.mkdir(parents=True, exist_ok=True)
        pictures = portraits(np.arange(arguments.people), GRID_SIZE)
        Image.fromarray(tile(pictures, GRID_COLUMNS)).save(arguments.grid, optimize=True, quality=90)
        print(arguments.grid)


if __name__ == "__main__":
    main()
