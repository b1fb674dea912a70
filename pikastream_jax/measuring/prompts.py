"""Does the face do what the prompt says: mean readings of a clip against fixed thresholds."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pikastream_jax.measuring.streams import Clip
from pikastream_jax.measuring.subjects import NEUTRAL, SMILING


@dataclasses.dataclass(frozen=True)
class Expectation:
    """The clip's mean of `quantity` lies beyond `threshold`: above it, or below it where `sign` is -1."""

    prompt: str
    quantity: str
    sign: int
    threshold: float

    def holds(self, clip: Clip) -> bool:
        return bool(self.sign * float(np.mean(getattr(clip.reading, self.quantity))) > self.sign * self.threshold)


# Thresholds halfway between what the renderer does on the prompt and on the neutral one (`pikastream_jax/data/motion.py`).
SMILE = Expectation(SMILING, "smile", 1, 0.45)
OTHERS = (
    Expectation("a person looking to the left", "gaze_x", -1, -0.35),
    Expectation("a person looking to the right", "gaze_x", 1, 0.35),
    Expectation("a person looking up", "gaze_y", -1, -0.35),
    Expectation("a person looking down", "gaze_y", 1, 0.35),
    Expectation("a person looking sad", "smile", -1, -0.25),
    Expectation("a person looking angry", "brow_furrow", 1, 0.40),
    Expectation("a person looking surprised", "brow_raise", 1, 0.55),
    Expectation("a person with the head tilted to the left", "roll", -1, -0.06),
    Expectation("a person with the head tilted to the right", "roll", 1, 0.06),
)


def adherence(expectation: Expectation, prompted: Sequence[Clip], neutral: Sequence[Clip]) -> dict[str, float | str]:
    """Share of clips on their side of the threshold.

    Returns:
      `told_apart`: mean of `prompted` (share beyond the threshold) and of the share of neutral clips that are not;
      the mean readings of both kinds.
    """
    hits = float(np.mean([expectation.holds(clip) for clip in prompted]))
    alarms = float(np.mean([expectation.holds(clip) for clip in neutral]))
    return {
        "prompt": expectation.prompt,
        "against": NEUTRAL,
        "measure": f"{expectation.quantity} {'>' if expectation.sign > 0 else '<'} {expectation.threshold}",
        "told_apart": (hits + 1.0 - alarms) / 2,
        "prompted": hits,
        "neutral": alarms,
        "mean_prompted": _mean(expectation.quantity, prompted),
        "mean_neutral": _mean(expectation.quantity, neutral),
        "clips": len(prompted) + len(neutral),
    }


def _mean(quantity: str, clips: Sequence[Clip]) -> float:
    return float(np.mean([np.mean(getattr(clip.reading, quantity)) for clip in clips]))
