"""How far the estimator can be trusted: its errors on held-out rendered faces, and the metric in which it tells people apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pikastream_jax.data.face import FaceState, hard_distractor, sample_identity, true_mouth
from pikastream_jax.measuring.estimator import Estimator, Reading
from pikastream_jax.measuring.subjects import film

SEED = 8_000_000
STATES = 6  # pictures of every person
_SEEN = ("opening", "width", "smile", "yaw", "pitch", "roll", "gaze_x", "gaze_y", "blink", "brow_raise", "brow_furrow")
# Ranges of the states: what talking people do.
_RANGES = {
    "yaw": (-0.25, 0.25), "pitch": (-0.15, 0.15), "roll": (-0.13, 0.13), "shift_x": (-0.02, 0.02),
    "shift_y": (-0.02, 0.02), "gaze_x": (-1.0, 1.0), "gaze_y": (-1.0, 1.0), "brow_raise": (-0.5, 1.0),
    "smile": (-1.0, 1.0), "mouth_width": (-1.0, 1.0), "tongue": (0.0, 1.0), "breath": (-1.0, 1.0),
}  # fmt: skip
_OFTEN_ZERO = {"blink": (0.0, 1.0), "brow_furrow": (0.0, 1.0), "mouth_open": (0.0, 1.0)}


@dataclasses.dataclass(frozen=True)
class IdentityMetric:
    """Distance of two faces in the estimator's parameters, in units of its own scatter on one and the same person.

    A linear discriminant: the covariance is that of readings of one person in different states, so what changes with the
    head's pose counts little, and what tells people apart counts much.
    """

    whitening: Float[np.ndarray, "32 32"]

    def distance(self, a: Float[np.ndarray, "*b 32"], b: Float[np.ndarray, "*b 32"]) -> Float[np.ndarray, "*b"]:
        """Root mean square over the parameters; about 1.4 between two pictures of one person."""
        return np.sqrt(np.mean(((a - b) @ self.whitening) ** 2, axis=-1))


def calibrate(estimator: Estimator, people: int = 64, size: int = 256) -> tuple[dict[str, dict[str, float]], IdentityMetric]:
    """Errors on `people` held-out people in 6 random states each, and the identity metric they give.

    Args:
      size: pixels each way of the pictures, as the generator makes them.

    Returns:
      Figures: for each quantity the mean absolute error and the correlation with the truth; for `closed_lips` the share
      of pictures that fall on the right side of the closure threshold; for `identity` the area under the ROC curve of
      "same person" against hard distractors (same hair, clothes, background), people of the metric left out of it, and
      the share of 20-distractor trials that the right person wins. Then the metric, from half of the people.

    Raises:
      ValueError: fewer than 24 people.
    """
    if people < 24:
        raise ValueError(f"people={people} are too few to estimate a covariance of 32 numbers: use at least 24")
    readings, truths = [], []
    for row in range(people):
        identity, states = _subject(SEED + row)
        reading = estimator(film(identity, states, size))
        readings.append(reading)
        opening, width = jnp.clip(states.mouth_open, 0, 1), true_mouth(identity, states)[1]
        seen = {name: getattr(states, name) for name in _SEEN[2:]} | {"opening": opening, "width": width}
        truths.append({name: np.asarray(value) for name, value in seen.items()})
    figures = {name: _agreement(_gather(truths, name), _stack(readings, name)) for name in _SEEN}
    opening, read = _gather(truths, "opening"), _stack(readings, "opening")
    clear = (opening <= 0.08) | (opening >= 0.13)  # what the tracks hold: closures below, vowels above
    figures["closed_lips"] = {"right_side": float(np.mean((opening < 0.10) == (read < 0.10), where=clear))}
    half = people // 2
    metric = identity_metric([reading.identity for reading in readings[:half]])
    figures["identity"] = _identity_figures(estimator, metric, range(SEED + half, SEED + people), readings[half:], size)
    return figures, metric


def identity_metric(readings: list[Float[np.ndarray, "states 32"]]) -> IdentityMetric:
    """The metric that whitens the scatter of readings about each person's mean."""
    centred = np.concatenate([reading - reading.mean(axis=0) for reading in readings])
    freedom = sum(len(reading) - 1 for reading in readings)
    covariance = centred.T @ centred / freedom
    # Shrunk towards its diagonal: few pictures, many parameters.
    covariance = 0.7 * covariance + 0.3 * np.diag(np.diag(covariance)) + 1e-4 * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    return IdentityMetric(vectors @ np.diag(values**-0.5) @ vectors.T)


def _identity_figures(
    estimator: Estimator, metric: IdentityMetric, seeds: range, readings: list[Reading], size: int
) -> dict[str, float]:
    """One picture of a person against another of the same person, and against distractors in that other picture's state."""
    same, other, wins = [], [], []
    for seed, reading in zip(seeds, readings, strict=True):
        identity, states = _subject(seed)
        last = jax.tree.map(lambda leaf: leaf[-1:], states)
        keys = jax.random.split(jax.random.key(seed + 1_000_000), 5)
        distractors = [estimator(film(_other(key, identity), last, size)).identity for key in keys]
        near = metric.distance(reading.identity[0], reading.identity[-1])
        far = metric.distance(reading.identity[0], np.concatenate(distractors))
        same.append(near)
        other.extend(far)
        wins.append(bool(near < far.min()))
    same, other = np.asarray(same), np.asarray(other)
    return {"auc_hard_distractors": float(np.mean(same[:, None] < other[None, :])), "wins_of_5": float(np.mean(wins))}


def _agreement(true: np.ndarray, read: np.ndarray) -> dict[str, float]:
    return {"mae": float(np.abs(true - read).mean()), "r": float(np.corrcoef(true, read)[0, 1])}


def _stack(readings: list[Reading], name: str) -> np.ndarray:
    return np.concatenate([getattr(reading, name) for reading in readings])


def _gather(truths: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    return np.concatenate([truth[name] for truth in truths])


def _subject(seed: int):
    return _random_subject(jax.random.key(seed))


@jax.jit
def _random_subject(key: Array):
    k_identity, k_state = jax.random.split(key)
    fields = {}
    for index, (name, (low, high)) in enumerate((_RANGES | _OFTEN_ZERO).items()):
        k_value, k_zero = jax.random.split(jax.random.fold_in(k_state, index))
        value = jax.random.uniform(k_value, (STATES,), minval=low, maxval=high)
        zero = jax.random.uniform(k_zero, (STATES,)) < (0.4 if name in _OFTEN_ZERO else 0.0)
        fields[name] = jnp.where(zero, 0.0, value)
    return sample_identity(k_identity), FaceState(**fields)


@jax.jit
def _other(key: Array, identity):
    return hard_distractor(key, identity)
