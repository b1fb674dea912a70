"""Do the lips follow the words: curves of mouth opening and width, measured in pixels, against the true ones.

All curves have one value per video frame. A positive lag means that the picture comes later than the sound.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

MAX_LAG = 10  # frames
# Lips count as closed below this opening. In the true tracks 0.08 and less stands for pauses and closures, 0.13 and
# more for the weakest vowel (`pikastream_jax/data/speech.py`): of the corpus's frames 41% lie below 0.08 and 3% between
# the two, so the true closures hardly depend on where in between the threshold is.
CLOSED = 0.10
TOLERANCE = 1  # frames by which a closure may be early or late


@dataclasses.dataclass(frozen=True)
class Closures:
    """Lip closures of one or more clips, counted."""

    matched: int
    true: int
    measured: int

    def __add__(self, other: "Closures") -> "Closures":
        return Closures(self.matched + other.matched, self.true + other.true, self.measured + other.measured)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; NaN where neither curve has a closure."""
        total = self.true + self.measured
        return 2 * self.matched / total if total else float("nan")

    def report(self) -> dict[str, float]:
        """F1, precision, recall and the counts."""
        return {
            "f1": self.f1,
            "precision": self.matched / self.measured if self.measured else float("nan"),
            "recall": self.matched / self.true if self.true else float("nan"),
            "true": self.true,
            "measured": self.measured,
        }


def correlations(true: Float[np.ndarray, " t"], measured: Float[np.ndarray, " t"]) -> Float[np.ndarray, " lags"]:
    """Pearson correlation at each lag from -10 to 10 frames, of the frames that overlap; NaN where a curve is constant.

    Raises:
      ValueError: curves of different lengths, or shorter than 25 frames.
    """
    if true.shape != measured.shape or len(true) < 25:
        raise ValueError(
            f"curves of {len(true)} and {len(measured)} frames: give two of one length, at least 25 frames"
        )
    result = []
    for lag in range(-MAX_LAG, MAX_LAG + 1):
        a = true[max(0, -lag) : len(true) - max(0, lag)]
        b = measured[max(0, lag) : len(measured) - max(0, -lag)]
        a, b = a - a.mean(), b - b.mean()
        norm = np.sqrt((a * a).sum() * (b * b).sum())
        result.append((a * b).sum() / norm if norm > 1e-9 else np.nan)
    return np.asarray(result)


def closure_runs(opening: Float[np.ndarray, " t"], threshold: float = CLOSED) -> list[tuple[int, int]]:
    """First and last frame of every closure: frames below the threshold, one at least, right after an open frame."""
    closed: Bool[np.ndarray, " t"] = np.asarray(opening) < threshold
    edge = np.flatnonzero(np.diff(np.concatenate([[False], closed, [False]]).astype(int)))
    runs = list(zip(edge[::2].tolist(), (edge[1::2] - 1).tolist(), strict=True))
    return [run for run in runs if run[0] > 0]  # a clip that starts closed has not closed its lips


def match_closures(true: Float[np.ndarray, " t"], measured: Float[np.ndarray, " t"]) -> Closures:
    """Closures of both curves by the same rule, matched one to one in order of time.

    A closure is a run of frames with an opening below 0.10 that follows an open frame. Two match when their first frames
    are at most one frame apart; each serves once, and of several the nearest is taken. So the long closure of a pause is
    one closure, lips that flutter through it are wrong, and so are lips that come two frames late.
    """
    wanted, found = closure_runs(true), closure_runs(measured)
    free = set(range(len(found)))
    matched = 0
    for start, _ in wanted:
        near = [i for i in free if abs(found[i][0] - start) <= TOLERANCE]
        if near:
            free.remove(min(near, key=lambda i: abs(found[i][0] - start)))
            matched += 1
    return Closures(matched, len(wanted), len(found))


def compare(
    true_opening: Sequence[Float[np.ndarray, " t"]],
    measured_opening: Sequence[Float[np.ndarray, " t"]],
    true_width: Sequence[Float[np.ndarray, " t"]],
    measured_width: Sequence[Float[np.ndarray, " t"]],
) -> dict[str, dict[str, float]]:
    """Figures over clips.

    Returns:
      `opening` and `width`: the lag in frames at which the correlation, averaged over clips, is highest; the correlation
      there and at no lag; and the worst clip's. `closures`: see `Closures.report`, pooled over clips; `f1_chance` is the F1
      of each measured curve against the next clip's truth, what lips reach that close as often but to other words.

    Raises:
      ValueError: no clips.
    """
    if not true_opening:
        raise ValueError("no clips to compare: give at least one")
    others = [*true_opening[1:], true_opening[0]]
    return {
        "opening": _at_best_lag(true_opening, measured_opening),
        "width": _at_best_lag(true_width, measured_width),
        "closures": _pooled(true_opening, measured_opening).report()
        | {"f1_chance": _pooled(others, measured_opening).f1 if len(true_opening) > 1 else float("nan")},
    }


def _pooled(true: Sequence[np.ndarray], measured: Sequence[np.ndarray]) -> Closures:
    return sum((match_closures(t, m) for t, m in zip(true, measured, strict=True)), start=Closures(0, 0, 0))


def _at_best_lag(true: Sequence[np.ndarray], measured: Sequence[np.ndarray]) -> dict[str, float]:
    # A curve that does not move agrees with nothing.
    table = np.nan_to_num([correlations(t, m) for t, m in zip(true, measured, strict=True)])
    mean = table.mean(axis=0)
    best = int(mean.argmax())
    return {
        "r": float(mean[best]),
        "lag_frames": best - MAX_LAG,
        "r_at_lag_0": float(mean[MAX_LAG]),
        "worst_clip_r": float(table[:, best].min()),
        "clips": len(table),
    }
