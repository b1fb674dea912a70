"""A row of the results: how it is described, run, and recorded, whatever happens."""

import dataclasses
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.timing import Statistics

Row = dict[str, Any]  # as in the JSON file: name, status, error, what, ms, flops, bytes, figures, seconds, measured


class NotRunError(Exception):
    """A row that has nothing to measure here, for the reason given; not a failure."""


class NotOfferedError(Exception):
    """An implementation that does not take this shape."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a row has found."""

    what: str  # exactly what is timed, or checked
    ms: Statistics | None = None
    flops: Mapping[str, int] = dataclasses.field(default_factory=dict)  # operations of matrix products, by operand: "bf16", "fp8"
    bytes: int = 0  # the fewest that must move through device memory
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # whatever else: fps, latency_ms, peak_bytes, ...


@dataclasses.dataclass(frozen=True)
class Bench:
    """One row to be."""

    name: str
    run: Callable[[], Measurement]
    seconds: float = 3.0  # expected, on a GPU
    requires: tuple[str, ...] = ()  # rows that must be ok before

    limit_seconds: float | None = None  # None: a minute and three times what is expected

    @property
    def limit(self) -> float:
        """Seconds after which it counts as hanging."""
        return self.limit_seconds or 60 + 3 * self.seconds


@dataclasses.dataclass(frozen=True)
class Job:
    """Rows that share a process, most important first."""

    name: str
    benches: tuple[Bench, ...]
    prepare: Callable[[list[str]], None] = lambda names: None  # gets the names of the rows that will run, once, before the first
    most_seconds: float | None = None  # after which its process is ended, whatever is left
    uses_torch: bool = False  # then JAX stays on the CPU and leaves the GPU's memory alone


def one_line(error: BaseException) -> str:
    """The kind of error and what it says, shortened to a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def not_run(name: str, reason: str) -> Row:
    return {"name": name, "status": "not run", "error": reason}


def failed(name: str, reason: str) -> Row:
    return {"name": name, "status": "failed", "error": reason}


def run_bench(bench: Bench) -> Row:
    """The row of `bench`: any exception becomes a row that says so, with the traceback on standard error."""
    start = time.perf_counter()
    row: Row = {"name": bench.name, "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        found = bench.run()
    except NotRunError as error:
        row |= {"status": "not run", "error": str(error)}
    except NotOfferedError as error:
        row |= {"status": "not offered", "error": " ".join(str(error).split())[:300]}
    except Exception as error:
        traceback.print_exc()
        row |= {"status": "failed", "error": one_line(error)}
    else:
        row |= {"status": "ok", **dataclasses.asdict(found)}
        if found.figures.get("passed") is False:
            row |= {"status": "failed", "error": found.figures["failure"]}
    return row | {"seconds": time.perf_counter() - start}
