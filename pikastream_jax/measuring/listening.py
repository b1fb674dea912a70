"""Is the face alive while nobody speaks, and does the seed change what it should: head and lids, but not the lips."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from pikastream_jax.data.motion import EYE_PER_RADIAN
from pikastream_jax.data.speech import SAMPLE_RATE
from pikastream_jax.measuring.estimator import Estimator, Reading
from pikastream_jax.measuring.streams import Scene, TalkingFace, generated, samples_of, true
from pikastream_jax.measuring.subjects import FPS, NEUTRAL, draw, excerpt, person, portrait_state, true_curves

SHUT = 0.5  # reading of the lids from which on an eye is shut
CAMERA = 0.35  # gaze sideways within which it meets the viewer's; the prompts' threshold


def shut(blink: Float[np.ndarray, " t"]) -> Bool[np.ndarray, " t"]:
    """The frames with which blinks begin."""
    closed = blink > SHUT
    return closed & ~np.concatenate([[False], closed[:-1]])


def listening(
    face: TalkingFace,
    estimator: Estimator,
    people: Sequence[int],
    speech: list[Float[np.ndarray, " n"]],
    silent_chunks: int,
    spoken_chunks: int,
) -> dict[str, dict[str, float]]:
    """Streams that begin with silence and go on with speech, two seeds for each person.

    Returns:
      In silence, of the `generated` and of the `drawn` (the same people drawn, through FlashVAE): `blinks_per_minute`; `still_streams`, the
      share of streams without one; standard deviation of the head's angles in degrees, `yaw` and `pitch`; `eye_contact`, the share of
      frames that look neither left nor right of the viewer; `opening`, the lips' 95th percentile. Of the `seeds`: the correlation of two streams' `yaw`,
      `pitch` and `lids` in silence, and of their `lips` in speech; means over people.
    """
    quiet, total = samples_of(face, silent_chunks), samples_of(face, silent_chunks + spoken_chunks)
    silent, spoken = slice(quiet * FPS // SAMPLE_RATE), slice(quiet * FPS // SAMPLE_RATE, None)
    made, drawn, alike = [], [], []
    for index, seed in enumerate(people):
        identity = person(seed)
        audio = np.concatenate([np.zeros(quiet, np.float32), excerpt(speech, index, total - quiet)])
        scene = Scene(seed, NEUTRAL, identity, draw(identity, portrait_state(seed), face.height), audio, true_curves(identity, audio))
        one, other = (estimator(generated(face)(dataclasses.replace(scene, seed=seed + step))) for step in (0, 1))
        made += [_in_silence(one, silent), _in_silence(other, silent)]
        drawn.append(_in_silence(estimator(true(face)(scene)), silent))
        alike.append(
            {
                "yaw": _correlation(one.yaw[silent], other.yaw[silent]),
                "pitch": _correlation(one.pitch[silent], other.pitch[silent]),
                "lids": _correlation(one.blink[silent], other.blink[silent]),
                "lips": _correlation(one.opening[spoken], other.opening[spoken]),
            }
        )
    return {"generated": _mean(made), "drawn": _mean(drawn), "seeds": _mean(alike)}


def _in_silence(reading: Reading, silent: slice) -> dict[str, float]:
    begun = int(shut(reading.blink[silent]).sum())
    looks = np.abs(reading.gaze_x[silent] + EYE_PER_RADIAN * reading.yaw[silent]) < CAMERA  # eyes turn against the head to stay on target
    return {
        "blinks_per_minute": begun / (silent.stop / FPS / 60),
        "still_streams": float(begun == 0),
        "yaw": float(np.degrees(np.std(reading.yaw[silent]))),
        "pitch": float(np.degrees(np.std(reading.pitch[silent]))),
        "eye_contact": float(np.mean(looks)),
        "opening": float(np.percentile(reading.opening[silent], 95)),
    }


def _correlation(a: Float[np.ndarray, " t"], b: Float[np.ndarray, " t"]) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
