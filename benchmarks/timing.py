"""Repeated timing by the host's clock, and what is said of the samples."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

WARM_UP, LEAST, SECONDS, MOST_SECONDS = 2, 10, 0.5, 2.0


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of repeated samples, in milliseconds."""

    median: float
    min: float
    p10: float
    p90: float
    repeats: int
    warm_up: int  # runs before the first that counts


def summarise(samples: Sequence[float], warm_up: int = WARM_UP) -> Statistics:
    """Percentiles are interpolated between neighbouring samples.

    Raises:
      ValueError: no samples, or one that is not a positive number.
    """
    if not len(samples) or not all(0 < sample < float("inf") for sample in samples):
        raise ValueError(f"timing: {len(samples)} samples, which must be positive and at least one: {list(samples)[:3]}")
    p10, median, p90 = (float(np.percentile(samples, p)) for p in (10, 50, 90))
    return Statistics(median, float(min(samples)), p10, p90, len(samples), warm_up)


def repeat(
    run: Callable[[], T],
    *,
    warm_up: int = WARM_UP,
    least: int = LEAST,
    seconds: float = SECONDS,
    most_seconds: float = MOST_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[T]:
    """What `run` returns, run after run: at least `least` runs and `seconds`, but after `most_seconds` three are enough."""
    for _ in range(warm_up):
        run()
    results, start = [], clock()
    while True:
        results.append(run())
        elapsed = clock() - start
        if (len(results) >= least and elapsed >= seconds) or (len(results) >= 3 and elapsed >= most_seconds):
            return results


def measure(call: Callable[[], object], per: int = 1, **limits) -> Statistics:
    """Statistics of `call()`, which returns when its work is done; `per` equal pieces of work are in one call, and the time is of one."""

    def run() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3 / per

    return summarise(repeat(run, **limits), limits.get("warm_up", WARM_UP))
