"""One long stream: do colour, identity, memory and speed stay what they were in the first minute?"""

import dataclasses
import os
import time
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, UInt8

from pikastream_jax.data.speech import SAMPLE_RATE
from pikastream_jax.measuring.calibration import IdentityMetric
from pikastream_jax.measuring.estimator import Estimator
from pikastream_jax.measuring.images import lab
from pikastream_jax.measuring.streams import TalkingFace, corners
from pikastream_jax.measuring.subjects import FPS, NEUTRAL, draw, film, person, portrait_state, true_curves, true_motion

_SKIN = (0.4375, 0.5859), (0.3906, 0.6094)  # rows and columns, of the picture's sides: nose and cheeks of a face near the middle
_STATM = Path("/proc/self/statm")


@dataclasses.dataclass(frozen=True)
class Minute:
    """Means over one minute of the stream."""

    background: Float[np.ndarray, "3"]  # CIE Lab of the upper corners
    skin: Float[np.ndarray, "3"]  # CIE Lab of the middle of the face
    background_scatter: float  # Lab: root mean square distance of the chunks from the minute's mean
    skin_scatter: float
    identity_distance: float  # of the minute's mean reading from the reference, see `IdentityMetric`
    identity_scatter: float  # standard deviation of the distance over stretches of 6 s
    rss_mb: float  # memory of the process at the end of the minute; NaN where the system does not tell
    chunk_ms: float  # median time of a step

    def report(self) -> dict:
        """Plain numbers."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in dataclasses.asdict(self).items()
        }


def drift(
    face: TalkingFace,
    estimator: Estimator,
    metric: IdentityMetric,
    speech: Float[np.ndarray, " n"],
    seed: int,
    minutes: float,
) -> dict:
    """Streams `minutes` of the speech, repeated with a second of silence in between, and compares the minutes.

    Every 4th chunk gives one frame to the estimator; colours are taken from every chunk. The last, incomplete minute
    counts if it has half a minute at least.

    Returns:
      `minutes`: see `Minute`. `colour_background` and `colour_skin`: Lab distance of each minute from the first, the
      largest; `colour_..._first_minute`: the scatter within the first minute. `identity_change`: largest increase of the
      distance from the reference over the first minute's; `identity_first_minute`: its scatter. `rss_growth_mb`: largest
      minute over first. `chunk_time_ratio`: slowest minute over the first. `frames_per_second`: of generation alone.

    Raises:
      ValueError: less than a minute.
    """
    if minutes < 1:
        raise ValueError(
            f"minutes of drift {minutes} must be at least 1: the first minute is what the others are compared with"
        )
    identity = person(seed)
    image = draw(identity, portrait_state(seed), face.height)
    home = estimator(image[None]).identity[0]
    loop = _loop(speech)
    session = face.session(image, NEUTRAL, seed)
    at = index = 0
    done, colours, times, sampled = [], [], [], []
    total = round(minutes * 60 * SAMPLE_RATE)
    while at < total:
        count = face.chunk_samples(index)
        piece = loop[np.arange(at, at + count) % len(loop)]
        started = time.perf_counter()
        frames = np.asarray(session.step(piece))  # waits for the device
        times.append(time.perf_counter() - started)
        if len(frames):  # a rolling stream gives its first ones late
            colours.append(colours_of(frames[len(frames) // 2]))
            if index % 4 == 0:
                sampled.append(frames[len(frames) // 2])
        at, index = at + count, index + 1
        whole = (len(done) + 1) * 60 * SAMPLE_RATE
        if at >= whole or (at >= total and at - whole >= -30 * SAMPLE_RATE):
            done.append(_minute(colours, times, sampled, estimator, metric, home))
            colours, times, sampled = [], [], []
    first = done[0]
    return {
        "minutes": [minute.report() for minute in done],
        "colour_background": _largest([np.linalg.norm(m.background - first.background) for m in done]),
        "colour_background_first_minute": first.background_scatter,
        "colour_skin": _largest([np.linalg.norm(m.skin - first.skin) for m in done]),
        "colour_skin_first_minute": first.skin_scatter,
        "identity_change": _largest([m.identity_distance - first.identity_distance for m in done]),
        "identity_first_minute": first.identity_scatter,
        "rss_growth_mb": _largest([m.rss_mb - first.rss_mb for m in done]),
        "chunk_time_ratio": _largest([m.chunk_ms / first.chunk_ms for m in done]),
        "frames_per_second": float(len(frames) / np.mean([m.chunk_ms for m in done]) * 1e3),
        "video_seconds": index * len(frames) / FPS,
    }


def drawn_drift(
    face: TalkingFace, estimator: Estimator, metric: IdentityMetric, speech: Float[np.ndarray, " n"], seed: int, minutes: int
) -> dict:
    """What `drift` says about the identity of somebody who cannot drift: the same person drawn, as long, through FlashVAE.

    Heads turn and lips move differently from minute to minute, and the reading with them; a stream drifts if it changes more than this.
    Frames are taken as far apart as there.

    Returns:
      `identity_change` and `identity_first_minute`, as in `drift`.
    """
    identity = person(seed)
    home = estimator(draw(identity, portrait_state(seed), face.height)[None]).identity[0]
    loop = _loop(speech)
    motion = true_motion(seed, NEUTRAL, true_curves(identity, loop[np.arange(minutes * 60 * SAMPLE_RATE) % len(loop)]).track)
    every, shown = 4 * face.chunk_samples(0) * FPS // SAMPLE_RATE, 8  # video frames: between two that are read, and drawn for each
    done = []
    for minute in range(minutes):
        starts = range(minute * 60 * FPS, (minute + 1) * 60 * FPS - shown, every)
        clips = [film(identity, jax.tree.map(lambda leaf, at=at: leaf[at : at + shown], motion), face.height) for at in starts]
        done.append(_identity(np.stack([face.reconstruct(clip)[-1] for clip in clips]), estimator, metric, home))
    return {"identity_change": _largest([distance - done[0][0] for distance, _ in done]), "identity_first_minute": done[0][1]}


def _loop(speech: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """What is repeated: the speech and a second of silence."""
    return np.concatenate([speech, np.zeros(SAMPLE_RATE, np.float32)])


def colours_of(frames: UInt8[np.ndarray, "*t h w 3"]) -> Float[np.ndarray, "*t 2 3"]:
    """Mean CIE Lab colour of the upper corners, where only the background is, and of nose and cheeks."""
    (top, bottom), (left, right) = ([round(share * side) for share in span] for span, side in zip(_SKIN, frames.shape[-3:-1], strict=True))
    skin = frames[..., top:bottom, left:right, :]
    return np.stack([lab(part.mean(axis=(-3, -2))) for part in (corners(frames), skin)], axis=-2)


def _minute(colours, times, sampled, estimator: Estimator, metric: IdentityMetric, home) -> Minute:
    table = np.stack(colours)
    mean = table.mean(axis=0)
    scatter = np.sqrt(((table - mean) ** 2).sum(axis=-1).mean(axis=0))
    distance, distance_scatter = _identity(np.stack(sampled), estimator, metric, home)
    return Minute(
        background=mean[0],
        skin=mean[1],
        background_scatter=float(scatter[0]),
        skin_scatter=float(scatter[1]),
        identity_distance=distance,
        identity_scatter=distance_scatter,
        rss_mb=_rss_mb(),
        chunk_ms=float(np.median(times) * 1e3),
    )


def _identity(frames, estimator: Estimator, metric: IdentityMetric, home) -> tuple[float, float]:
    """Distance of the mean reading from the reference, and the standard deviation of the distance over stretches of three frames."""
    known = estimator(frames).identity
    stretches = np.array_split(known, max(1, len(known) // 3))
    distances = [metric.distance(part.mean(axis=0), home) for part in stretches]
    return float(metric.distance(known.mean(axis=0), home)), float(np.std(distances))


def _rss_mb() -> float:
    """Resident memory of this process; only Linux tells it as it is now."""
    if not _STATM.is_file():
        return float("nan")
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _largest(values) -> float:
    return float(np.max(values))
