"""Two ways of making the same clips, compared clip by clip: the mean difference in units of its own standard error.

Clips differ from each other far more than two models do. Made for the same people, words and noise, they are pairs, and what makes one of
them hard falls out of the difference (the paired t-test's statistic, Student 1908).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

CLEAR = 2.0  # standard errors from which on a difference is called one


@dataclasses.dataclass(frozen=True)
class Paired:
    """What `compared` found; NaN where a clip could not be measured in both."""

    first: float  # means
    second: float
    difference: float  # second - first
    standard_error: float  # of the difference
    pairs: int

    @property
    def standard_errors(self) -> float:
        """The difference in standard errors; 0 where nothing differs."""
        if self.difference == 0.0:
            return 0.0
        return float(np.divide(self.difference, self.standard_error)) if self.standard_error else float(np.copysign(np.inf, self.difference))

    def verdict(self, better: int) -> str:
        """`better`, `worse` or `same` of the second; `more` or `less` where neither is better.

        Args:
          better: 1 where more is better, -1 where less is, 0 where the measure only says what is.
        """
        if abs(self.standard_errors) < CLEAR:
            return "same"
        up = self.difference > 0
        if better == 0:
            return "more" if up else "less"
        return "better" if up == (better > 0) else "worse"


def compared(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> Paired:
    """Compares two rows of measurements of the same n clips; a pair with a NaN is left out.

    Raises:
      ValueError: rows of different lengths, or fewer than 2 whole pairs.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} clips make no pairs: measure both on the same clips")
    whole = np.isfinite(first) & np.isfinite(second)
    n = int(whole.sum())
    if n < 2:
        raise ValueError(f"{n} of {len(first)} pairs of clips could be measured: a standard error takes 2 at least, use more clips")
    difference = second[whole] - first[whole]
    return Paired(
        float(first[whole].mean()), float(second[whole].mean()), float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(n)), n
    )


def table(
    names: tuple[str, str],
    first: Mapping[str, Float[np.ndarray, " n"]],
    second: Mapping[str, Float[np.ndarray, " n"]],
    better: Mapping[str, int],
) -> str:
    """One line for each measure that both have.

    Args:
      names: of the two.
      better: for each measure, as in `Paired.verdict`; a measure that is not named has no better side.
    """
    lines = [f"{'measure':24} {names[0][-14:]:>14} {names[1][-14:]:>14} {'difference':>11} {'std. error':>11} {'in errors':>9} {'pairs':>5}"]
    for measure in [name for name in first if name in second]:
        try:
            found = compared(first[measure], second[measure])
        except ValueError:
            lines.append(f"{measure:24} could be measured in fewer than 2 pairs")
            continue
        lines.append(
            f"{measure:24} {found.first:14.4f} {found.second:14.4f} {found.difference:+11.4f} {found.standard_error:11.4f} "
            f"{found.standard_errors:+9.1f} {found.pairs:5d}  {found.verdict(better.get(measure, 0))}"
        )
    return "\n".join(lines)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over what is finite; NaN where that is too little."""
    kept = np.asarray(values, np.float64)
    kept = kept[np.isfinite(kept)]
    return (float(kept.mean()) if len(kept) else np.nan), (float(kept.std(ddof=1) / np.sqrt(len(kept))) if len(kept) > 1 else np.nan)
