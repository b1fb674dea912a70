"""Clips that say which they are, in a folder as `training/clips.py` writes it, and batches of them without a folder."""

import functools
from pathlib import Path

import jax
import numpy as np

from pikastream_jax.config import Config
from pikastream_jax.data.corpus import MEL_FRAMES
from pikastream_jax.measuring.estimator import COLUMNS, READERS
from pikastream_jax.training.clips import MEASURES, conclude
from pikastream_jax.training.dit_data import ClipWindows
from pikastream_jax.training.innovations import fit_innovations
from pikastream_jax.training.records import Plan, write_records

LENGTH, COUNT = 12, 4
OUTPUTS = sum(reader.outputs for reader in READERS.values())
CHANGED = 7  # latent frame at which clips of odd numbers follow their second caption


def coded_clip(config: Config, clip: int) -> dict[str, np.ndarray]:
    """Latents are 100 x clip + latent frame, the reference clip + 1, captions of tokens 10 + clip and 20 + clip.

    Lips open from 0 to 15 / 32 over four latent frames, again and again; in the first of the four they are closed.
    The sound of latent frame n has the level 5 + clip + n. Clip n is better than clip n - 1 by every measure.
    """
    frame = np.arange(LENGTH)
    value = 100 * clip + frame
    grid = (*config.latent_grid, config.dit.latent_channels)
    boxes = np.zeros((LENGTH, 2, 4), np.float32)
    boxes[:, 0] = [9, 8, 17, 16]  # touches rows 1-2 (8 to 24 pixels) and column 1
    boxes[:, 1] = [0, 0, 7.5, 32]  # row 0
    truth = np.repeat(value[:, None] / 100, OUTPUTS, axis=-1).astype(np.float32)
    truth[..., COLUMNS == "blink"] = -0.5  # open eyes
    history = config.audio.mel_frames - MEL_FRAMES
    level = 5 + clip + (np.arange(-history, LENGTH * MEL_FRAMES) // MEL_FRAMES)
    return {
        "latents": np.broadcast_to(value[:, None, None, None], (LENGTH, *grid)).astype(np.float16),
        "reference": np.full(grid, 1.0 + clip, np.float16),
        "boxes": boxes,
        "truth": truth,
        "opening": (np.arange(4 * LENGTH) % 16 / 32).reshape(LENGTH, 4).astype(np.float16),
        "mel": np.repeat(level[:, None], config.audio.mels, axis=1).astype(np.uint8),
        "tokens": np.array([[10 + clip] * config.text.length, [20 + clip] * config.text.length], np.int32),
        "valid": np.array([4, 5], np.int32),
        "frame_prompt": ((frame >= CHANGED) & (clip % 2 == 1)).astype(np.int32),
        "measures": np.full(len(MEASURES), clip, np.float32),
    }


def write_coded(folder: Path, config: Config, count: int = COUNT, **made_with) -> Path:
    """The folder, with latents that need no normalising."""

    def neutral(open_split):
        grid = np.zeros(config.dit.latent_channels, np.float32)
        return conclude(open_split) | {"statistics.mean": grid, "statistics.std": grid + 1}

    plan = Plan({"train": count, "held_out": count}, 3, {"words": []} | made_with)
    write_records(folder, plan, lambda split, first, many: (coded_clip(config, first + i) for i in range(many)), neutral)
    return folder


@functools.cache
def coded_constants(config: Config) -> dict:
    """`clip_constants` of such clips."""
    return {"innovations": fit_innovations(np.stack([coded_clip(config, clip)["truth"] for clip in range(COUNT)]))}


def coded_batch(config: Config, batch: int, frames: int, **replaced: np.ndarray) -> ClipWindows:
    """The first `frames` latent frames of clips 0, 1, 2, 3, 0, ...; `replaced` are other fields of every row."""
    rows = []
    for row in range(batch):
        clip = coded_clip(config, row % COUNT) | replaced
        whole = {"reference", "tokens", "valid", "mel"}
        cut = {name: value if name in whole else value[:frames] for name, value in clip.items() if name != "measures"}
        cut["mel"] = clip["mel"][: MEL_FRAMES * (frames - 1) + config.audio.mel_frames]
        rows.append(ClipWindows(**cut))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
