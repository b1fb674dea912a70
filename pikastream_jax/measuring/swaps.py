"""How long a live change takes to show: frames from a new reference, or a new prompt, to the first frame that follows it and stays."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from pikastream_jax.measuring.batch_streams import BatchStream, audio_of_chunk, read_rows
from pikastream_jax.measuring.calibration import IdentityMetric
from pikastream_jax.measuring.estimator import Estimator, Reading, join
from pikastream_jax.measuring.prompts import SMILE
from pikastream_jax.measuring.subjects import NEUTRAL, SMILING, draw, person, portrait_state
from pikastream_jax.streaming.generator import Generator

BEFORE, AFTER = 6, 8  # chunks before the change, which fill the window, and after it
HOLD = 12  # frames that must be left after a change that counts: fewer show nothing about staying
STAYS = 0.9  # share of the frames left that must show it


@dataclasses.dataclass(frozen=True)
class Swaps:
    """Frames until the change shows, one for each stream; infinite where it never does within `observed` frames."""

    frames: Float[np.ndarray, " b"]
    observed: int

    def report(self, fps: int) -> dict[str, float | list[float] | int | None]:
        """Median in frames and seconds (infinite counts, so None means that at least half never show it), and the share that shows."""
        middle = float(np.median(self.frames))
        return {
            "frames": middle if np.isfinite(middle) else None,
            "seconds": middle / fps if np.isfinite(middle) else None,
            "share_that_shows": float(np.isfinite(self.frames).mean()),
            "streams": [float(frames) if np.isfinite(frames) else None for frames in self.frames],
            "observed_frames": self.observed,
        }

    @property
    def censored(self) -> Float[np.ndarray, " b"]:
        """What never showed counted as long as it was looked at, so that means exist."""
        return np.minimum(self.frames, self.observed)


def frames_until(shows: Bool[np.ndarray, " t"]) -> float:
    """Index of the first frame that shows the change, after which at least 90% of the frames do; infinite where there is none.

    At least 12 frames must be left, so that a single lucky one at the end does not count.
    """
    shows = np.asarray(shows, bool)
    left = np.arange(len(shows), 0, -1)
    share = np.cumsum(shows[::-1])[::-1] / np.maximum(left, 1)
    found = np.flatnonzero(shows & (share >= STAYS) & (left >= HOLD))
    return float(found[0]) if len(found) else float("inf")


def swapped_references(
    generator: Generator, estimator: Estimator, metric: IdentityMetric, people: Sequence[int], audio: Float[np.ndarray, "b n"]
) -> Swaps:
    """Each stream goes on as the next person: frames until its reading is nearer to the new reference's than to the old one's.

    Args:
      people: seeds; neighbours must differ.
      audio: sound of at least `BEFORE + AFTER` chunks for each.
    """
    images = [draw(person(seed), portrait_state(seed), generator.height) for seed in people]
    known = estimator(np.stack(images)).identity
    after = _readings(generator, estimator, people, images, audio, lambda stream: stream.swap_references([*images[1:], images[0]]))
    return Swaps(np.asarray([frames_until(shows) for shows in nearer_to_the_next(after, known, metric)]), len(after[0].opening))


def nearer_to_the_next(readings: Sequence[Reading], known: Float[np.ndarray, "b 32"], metric: IdentityMetric) -> list[Bool[np.ndarray, " t"]]:
    """For the readings of each stream, the frames in which it looks more like the next person than like its own."""
    pairs = zip(readings, known, np.roll(known, -1, axis=0), strict=True)
    return [metric.distance(reading.identity, new) < metric.distance(reading.identity, old) for reading, old, new in pairs]


def swapped_prompts(generator: Generator, estimator: Estimator, people: Sequence[int], audio: Float[np.ndarray, "b n"]) -> Swaps:
    """Neutral streams are told to smile: frames until the smile reads above the threshold that tells smiling from neutral clips."""
    images = [draw(person(seed), portrait_state(seed), generator.height) for seed in people]
    after = _readings(generator, estimator, people, images, audio, lambda stream: stream.swap_prompts([SMILING] * len(people)))
    return Swaps(np.asarray([frames_until(reading.smile > SMILE.threshold) for reading in after]), len(after[0].opening))


def _readings(
    generator: Generator,
    estimator: Estimator,
    people: Sequence[int],
    images: Sequence[np.ndarray],
    audio: Float[np.ndarray, "b n"],
    change: Callable[[BatchStream], None],
) -> list[Reading]:
    """Readings of every stream's frames from the change on."""
    stream = BatchStream(generator, images, [NEUTRAL] * len(people), people)
    parts: list[list[Reading]] = [[] for _ in people]
    for index in range(BEFORE + AFTER):
        if index == BEFORE:
            change(stream)
        frames = stream.step(audio_of_chunk(generator, audio, index))
        if index >= BEFORE and frames.shape[1]:
            for some, reading in zip(parts, read_rows(estimator, frames), strict=True):
                some.append(reading)
    return [join(some) for some in parts]
