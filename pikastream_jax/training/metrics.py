"""The metrics of a run: one JSON object a line, in step order, and what they say about convergence.

Rows have `step` and `kind`: `train` rows are means over the updates since the previous one, `held_out` rows are the
stage's evaluation. `pandas.read_json(path, lines=True)` reads the file.
"""

import json
import os
from pathlib import Path
from typing import Any

from pikastream_jax.training.whole_file import write_whole

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends rows; on resuming, first drops the rows of updates that are going to be done again."""

    def __init__(self, path: str | os.PathLike[str], last_step: int):
        """Opens `path` for appending, keeping only its whole rows with `step <= last_step`."""
        self._path = path = Path(path)
        kept = [row for row in read_rows(path) if row["step"] <= last_step] if path.exists() else []
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("ab", buffering=0)  # nothing is left over to be written on closing

    def append(self, step: int, kind: str, values: dict[str, float], **more: Any) -> None:
        """Writes one row and hands it to the operating system, so that a plot can follow the run.

        Raises:
          OSError: it cannot be written.
        """
        rest = memoryview((json.dumps({"step": step, "kind": kind, **values, **more}) + "\n").encode())
        try:
            while rest:  # the last bytes of a disk are written before the next write says that it is full
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(f"{self._path} cannot be written ({error.strerror}): make room and run the same command again") from error

    def sync(self) -> None:
        """Puts every row on the disk: to be called before a checkpoint that stands for them is written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics file in order; a last line torn by a crash is left out.

    Raises:
      ValueError: a line before the last is not a JSON object.
    """
    lines = Path(path).read_text().split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the write was cut off
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error}): repair or remove it") from error
    return rows


def improvement(metrics_file: str | os.PathLike[str]) -> float:
    """Fraction by which the held-out loss fell over the last 20% of the updates (negative: it rose).

    The loss at 80% is interpolated between the evaluations around it.

    Args:
      metrics_file: path of a `metrics.jsonl`.

    Raises:
      ValueError: there is no evaluation at or before 80% of the last evaluated update to compare with, or a loss is not above 0, as that of a
        stage that climbs rewards may be: it has no scale to take a share of.
    """
    losses = [(row["step"], row["loss"]) for row in read_rows(metrics_file) if row["kind"] == "held_out"]
    last_step, last_loss = losses[-1] if losses else (0, 0.0)
    before = [point for point in losses if point[0] <= 0.8 * last_step]
    after = [point for point in losses if point[0] > 0.8 * last_step]
    if not before:
        raise ValueError(
            f"{metrics_file} has {len(losses)} held-out evaluations, none at or before 80% of step {last_step}: "
            "evaluate more often"
        )
    (x0, y0), (x1, y1) = before[-1], after[0]
    then = y0 + (y1 - y0) * (0.8 * last_step - x0) / (x1 - x0)
    if min(then, last_loss) <= 0:
        raise ValueError(f"{metrics_file}: of a loss that goes from {then:.3g} to {last_loss:.3g} no share can be told")
    return (then - last_loss) / then


def convergence_verdict(metrics_file: str | os.PathLike[str]) -> str:
    """One line for the log and the model card: converged means within 1% of what it was over the last 20% of the updates."""
    try:
        fraction = improvement(metrics_file)
    except ValueError as error:
        return f"convergence unknown: {error}"
    if fraction <= -0.01:
        return f"held-out loss rose {-100 * fraction:.1f}% over the last 20%: trained too long, or on too little data"
    verdict = "converged" if fraction < 0.01 else "under-trained"
    return f"held-out loss improved {100 * fraction:.1f}% over the last 20%: {verdict}"
