"""What a run was started from, by names that stay the same as long as the contents do: a run is not continued with something else.

A teacher, an anchor, clips or trajectories are read again whenever a run goes on. Had they been trained longer or made anew meanwhile, its updates
would silently be others than those of a run that was never stopped.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pikastream_jax.training.checkpoint import newest_record
from pikastream_jax.training.records import RECORD, read_record


def origins(init: Mapping[str, Path]) -> dict[str, str]:
    """For each thing that a stage starts from what it is: a run by its settings and how far it was trained, records by their number and
    what they were made with, a file by its bytes.

    Raises:
      FileNotFoundError: a folder that is neither a run nor one of records, or a run without a checkpoint.
      ValueError: records that cannot be read.
    """
    return {name: _origin(Path(path)) for name, path in sorted(init.items())}


def _origin(path: Path) -> str:
    if path.is_file():
        return f"{path.name} ({_short(path.read_bytes())})"
    if (path / RECORD).is_file():
        record = read_record(path)
        return f"records ({_short(json.dumps([record['counts'], record['made_with']], sort_keys=True).encode())})"
    updates, record = newest_record(path)
    made = {name: record[name] for name in ("stage", "seed", "total_steps", "config")}
    return f"{path.name}, {updates} updates ({_short(json.dumps(made, sort_keys=True).encode())})"


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
