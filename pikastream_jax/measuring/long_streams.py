"""Long streams of several people: lips, likeness, colour and flicker in the ten seconds before each of a few marks."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from pikastream_jax.data.speech import SAMPLE_RATE
from pikastream_jax.measuring.batch_streams import BatchStream, read_rows
from pikastream_jax.measuring.calibration import IdentityMetric
from pikastream_jax.measuring.drift import colours_of
from pikastream_jax.measuring.estimator import Estimator, join
from pikastream_jax.measuring.lipsync import MAX_LAG, correlations, match_closures
from pikastream_jax.measuring.streams import change, corners
from pikastream_jax.measuring.subjects import (
    FPS,
    NEUTRAL,
    TrueCurves,
    draw,
    excerpt,
    person,
    portrait_state,
    true_curves,
)
from pikastream_jax.streaming.generator import Generator

STRETCH = 10  # seconds before a mark that are measured
PAUSE = 1.0  # seconds of silence between two repetitions of the speech
# 1: more is better; -1: less is. Colours are CIE Lab distances from the reference picture, flicker is in 8-bit levels.
MEASURES = {
    "opening_r": 1,
    "width_r": 1,
    "closures_f1": 1,
    "opening_error": -1,
    "identity_distance": -1,
    "colour_background": -1,
    "colour_skin": -1,
    "flicker": -1,
}


@dataclasses.dataclass(frozen=True)
class Cast:
    """Whom long streams show and what they say; the same for everything that is compared."""

    people: tuple[int, ...]  # seeds
    audio: Float[np.ndarray, "b n"]
    truth: tuple[TrueCurves, ...]


def make_cast(people: Sequence[int], speech: Float[np.ndarray, " n"], seconds: float) -> Cast:
    """Everybody says other parts of the same speech, which repeats with a second of silence in between.

    Args:
      seconds: that the sound lasts.
    """
    loop = np.concatenate([speech, np.zeros(round(PAUSE * SAMPLE_RATE), np.float32)])
    audio = np.stack([excerpt([loop], index, round(seconds * SAMPLE_RATE)) for index in range(len(people))])
    return Cast(tuple(people), audio, tuple(true_curves(person(seed), row) for seed, row in zip(people, audio, strict=True)))


@dataclasses.dataclass(frozen=True)
class LongRun:
    """What was measured: by mark (seconds) and measure, one value per person; and how long a step of all streams took."""

    marks: dict[int, dict[str, Float[np.ndarray, " b"]]]
    step_seconds: float  # median


def run_long(
    generator: Generator, estimator: Estimator, metric: IdentityMetric, cast: Cast, marks: Sequence[int], label: str = "stream"
) -> LongRun:
    """Streams up to the last mark.

    Args:
      marks: seconds, ascending, each at least `STRETCH`; the cast's sound lasts longer than the last one by what is in flight.

    Raises:
      ValueError: marks that are too early or not ascending, or sound that is too short.
    """
    if list(marks) != sorted(set(marks)) or not marks or marks[0] < STRETCH:
        raise ValueError(f"marks {', '.join(map(str, marks)) or 'none'} must ascend from {STRETCH} s on: the {STRETCH} s before each are measured")
    images = [draw(person(seed), portrait_state(seed), generator.height) for seed in cast.people]
    home = estimator(np.stack(images)).identity
    colours = colours_of(np.stack(images))
    stream = BatchStream(generator, images, [NEUTRAL] * len(images), cast.people)
    frame = at = 0
    last, kept = marks[-1] * FPS, {mark: [[] for _ in images] for mark in marks}
    with tqdm(total=last, desc=label, unit="frame", leave=False) as bar:
        while frame < last:
            count = generator.chunk_samples(stream.chunk)
            piece = cast.audio[:, at : at + count]
            if piece.shape[1] < count:
                raise ValueError(f"the sound ends after {cast.audio.shape[1] / SAMPLE_RATE:.1f} s, before the mark at {marks[-1]} s: give more")
            frames = stream.step(piece)
            at += count
            for mark in marks:
                first = max(0, (mark - STRETCH) * FPS - frame)
                inside = frames[:, first : max(first, mark * FPS - frame)]
                if inside.shape[1]:
                    for some, *seen in zip(kept[mark], read_rows(estimator, inside), corners(inside), colours_of(inside), strict=True):
                        some.append(seen)
            frame += frames.shape[1]
            bar.update(frames.shape[1])
    found = {}
    for mark, rows in kept.items():
        span = slice((mark - STRETCH) * FPS, mark * FPS)
        people = [_measured(some, truth, span, metric, home[row], colours[row]) for row, (some, truth) in enumerate(zip(rows, cast.truth, strict=True))]
        found[mark] = {name: np.asarray([values[name] for values in people]) for name in MEASURES}
    return LongRun(found, float(np.median(stream.step_seconds[1:])))


def _measured(some: list, truth: TrueCurves, span: slice, metric: IdentityMetric, home: np.ndarray, colour: np.ndarray) -> dict[str, float]:
    """One person's ten seconds."""
    reading = join([part for part, _, _ in some])
    shown = np.concatenate([part for _, part, _ in some])
    background, skin = np.linalg.norm(np.concatenate([part for _, _, part in some]).mean(axis=0) - colour, axis=-1)
    opening, width = truth.opening[span], truth.width[span]
    return {
        "opening_r": correlations(opening, reading.opening)[MAX_LAG],
        "width_r": correlations(width, reading.width)[MAX_LAG],
        "closures_f1": match_closures(opening, reading.opening).f1,
        "opening_error": float(np.abs(reading.opening - opening).mean()),
        "identity_distance": float(metric.distance(reading.identity.mean(axis=0), home)),
        "colour_background": float(background),
        "colour_skin": float(skin),
        "flicker": change(shown),
    }
