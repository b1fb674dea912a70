"""What a generated clip of a prepared one is worth, against what the renderer was told when the prepared one was drawn.

The truth of the lips is known for every video frame (from the clip's speech), everything else as the mean over a latent frame, as clips keep it.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from pikastream_jax.data.face import neutral_state
from pikastream_jax.data.motion import SpeechTrack
from pikastream_jax.measuring.calibration import IdentityMetric
from pikastream_jax.measuring.estimator import COLUMNS, READERS, Reading
from pikastream_jax.measuring.lipsync import MAX_LAG, correlations, match_closures
from pikastream_jax.measuring.listening import shut
from pikastream_jax.measuring.streams import background_change
from pikastream_jax.measuring.subjects import FPS, mouth_of, person

DISTRACTORS = 20
_EXPRESSION = ("smile", "brow_raise", "brow_furrow", "gaze_x", "gaze_y")
_SCALES = {name: scale for reader in READERS.values() for name, (_, scale) in reader.quantities.items()}
_MEANS = {name: mean for reader in READERS.values() for name, (mean, _) in reader.quantities.items()}
# 1: more is better; -1: less is; 0: neither, to be held against the drawn clips'.
MEASURES = {
    "opening_r": 1,  # correlation of the lips' opening with the truth, at no lag
    "opening_error": -1,  # mean absolute, 0 .. 1
    "width_r": 1,  # correlation of the mouth's width
    "closures_f1": 1,  # see `lipsync.match_closures`
    "identity_distance": -1,  # of the mean reading from the person's own parameters, see `IdentityMetric`
    "identity_wins": 1,  # 1 if they are nearer than 20 other faces' under the same hair, clothes and light
    "smile_error": -1,  # mean absolute over latent frames, -1 .. 1
    "expression_error": -1,  # likewise of smile, brows and gaze, each in units of its scatter over people and clips
    "pose_error": -1,  # likewise of yaw, pitch and roll, in degrees; nobody can foretell most of it
    "yaw_deviation": 0,  # standard deviation in degrees
    "blinks_per_minute": 0,
    "flicker": -1,  # of the background from frame to frame, in 8-bit levels
}


@dataclasses.dataclass(frozen=True)
class ClipTruth:
    """The truth of one clip of t = stride x f video frames."""

    opening: Float[np.ndarray, " t"]
    width: Float[np.ndarray, " t"]  # in proportion: of some face, and no two faces differ but by a factor
    quantities: dict[str, Float[np.ndarray, " f"]]  # of `READERS`, in their units
    identity: Float[np.ndarray, " 32"]


def clip_truth(truth: Float[np.ndarray, "f o"], track: SpeechTrack) -> ClipTruth:
    """From what a clip keeps and the speech track it was drawn with.

    Args:
      truth: `true_readings`, mean over each latent frame.
    """
    frames, stride = len(track.mouth_open), len(track.mouth_open) // len(truth)
    quantities = {name: truth[:, column] * _SCALES[name] + _MEANS[name] for column, name in enumerate(COLUMNS) if name != "identity"}
    state = dataclasses.replace(
        neutral_state(frames),
        mouth_open=jnp.asarray(track.mouth_open),
        mouth_width=jnp.asarray(track.mouth_width),
        smile=jnp.asarray(np.repeat(quantities["smile"], stride)),
    )
    opening = np.clip(np.asarray(track.mouth_open), 0.0, 1.0)
    return ClipTruth(opening, mouth_of(person(0), state)[1], quantities, truth[:, COLUMNS == "identity"].mean(axis=0))


def measured(
    frames: UInt8[np.ndarray, "t h w 3"], reading: Reading, truth: ClipTruth, others: Float[np.ndarray, "n 32"], metric: IdentityMetric
) -> dict[str, float]:
    """All of `MEASURES` of one clip; NaN where one cannot be told (lips that need not move have no correlation).

    Args:
      others: the parameters of other people. The estimator reads just what `hard_distractor` exchanges, so each stands for a face with
        this person's hair, clothes and background.

    Raises:
      ValueError: fewer than 25 frames.
    """
    latent_frames = len(truth.quantities["smile"])

    def error(name: str) -> float:
        read = np.asarray(getattr(reading, name)).reshape(latent_frames, -1).mean(axis=1)
        return float(np.abs(read - truth.quantities[name]).mean())

    known = np.asarray(reading.identity).mean(axis=0)
    own, nearest = float(metric.distance(known, truth.identity)), float(metric.distance(known, others).min())
    return {
        "opening_r": float(correlations(truth.opening, reading.opening)[MAX_LAG]),
        "opening_error": float(np.abs(reading.opening - truth.opening).mean()),
        "width_r": float(correlations(truth.width, reading.width)[MAX_LAG]),
        "closures_f1": match_closures(truth.opening, reading.opening).f1,
        "identity_distance": own,
        "identity_wins": float(own < nearest),
        "smile_error": error("smile"),
        "expression_error": float(np.mean([error(name) / _SCALES[name] for name in _EXPRESSION])),
        "pose_error": float(np.degrees(np.mean([error(name) for name in ("yaw", "pitch", "roll")]))),
        "yaw_deviation": float(np.degrees(np.std(reading.yaw))),
        "blinks_per_minute": float(shut(np.asarray(reading.blink)).sum() / (len(frames) / FPS / 60)),
        "flicker": background_change(frames),
    }


def other_people(identities: Float[np.ndarray, "n 32"], index: int) -> Float[np.ndarray, "d 32"]:
    """The next 20 people of a list, or all others where there are fewer.

    Raises:
      ValueError: there is nobody else.
    """
    if len(identities) < 2:
        raise ValueError(f"{len(identities)} clip has no other people to be told from: give at least 2")
    count = min(DISTRACTORS, len(identities) - 1)
    return identities[(index + 1 + np.arange(count)) % len(identities)]
