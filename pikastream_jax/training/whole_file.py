"""A file that is written whole or not at all."""

import os
from pathlib import Path

UNFINISHED = ".unfinished"  # suffix of what is being written


def write_whole(path: Path, data: str | bytes) -> None:
    """Writes `path`, which holds what it held before until all of `data` would survive a loss of power.

    Raises:
      OSError: the disk is full or not writable.
    """
    unfinished = path.with_suffix(UNFINISHED)
    with open(unfinished, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
