"""Is it still the same person: generated clips against their reference and against people made up to look like it."""

from collections.abc import Sequence

import jax
import numpy as np

from pikastream_jax.data.face import hard_distractor
from pikastream_jax.measuring.calibration import IdentityMetric
from pikastream_jax.measuring.estimator import Estimator
from pikastream_jax.measuring.streams import Clip
from pikastream_jax.measuring.subjects import draw, portrait_state

DISTRACTORS = 20


def identity_wins(clips: Sequence[Clip], estimator: Estimator, metric: IdentityMetric) -> dict[str, float]:
    """Share of clips nearer to their reference than to each of 20 distractors.

    The distractors have the reference's hair, clothes, glasses, beard and background, its pose and expression, and
    another face. A clip is the mean of the readings of its frames.

    Returns:
      `wins` (0 .. 1); the mean `distance` to the reference and to the nearest distractor, see `IdentityMetric`.
    """
    wins, near, far = [], [], []
    for clip in clips:
        state = portrait_state(clip.scene.seed)
        keys = jax.random.split(jax.random.key(clip.scene.seed + 1), DISTRACTORS)
        distractors = np.stack([draw(_distractor(key, clip.scene.identity), state, clip.scene.reference.shape[0]) for key in keys])
        known = estimator(np.concatenate([clip.scene.reference[None], distractors])).identity
        distance = metric.distance(clip.reading.identity.mean(axis=0), known)
        wins.append(bool(distance[0] < distance[1:].min()))
        near.append(distance[0])
        far.append(distance[1:].min())
    return {
        "wins": float(np.mean(wins)),
        "distance_reference": float(np.mean(near)),
        "distance_nearest_distractor": float(np.mean(far)),
        "clips": len(clips),
        "distractors": DISTRACTORS,
    }


@jax.jit
def _distractor(key, identity):
    return hard_distractor(key, identity)
