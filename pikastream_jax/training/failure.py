"""What is kept of an update that was not finite, for `replay`: a folder `nan_step_00000123` in the run's.

The state before it is not there: it was overwritten before anyone looked. It follows from the checkpoint before it, bit for bit.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

_RECORD, _BATCH = "record.json", "batch.npz"


def keep_failure(out_dir: Path, step: int, record: dict[str, Any], batch: PyTree[Array]) -> Path:
    """Writes `record` (JSON) and the host batch ({} where the update draws its own from the key) of the update that made `step`.

    Returns:
      The folder.
    """
    folder = out_dir / f"nan_step_{step:08d}"
    folder.mkdir(exist_ok=True)
    (folder / _RECORD).write_text(json.dumps(record | {"step": step}, indent=2) + "\n")
    np.savez(folder / _BATCH, *map(np.asarray, jax.tree.leaves(batch)))
    return folder


def last_failure(out_dir: Path) -> dict[str, Any]:
    """The record of the step that was kept last, with `folder`.

    Raises:
      FileNotFoundError: none was.
    """
    folders = sorted(out_dir.glob("nan_step_*"), key=lambda folder: folder.stat().st_mtime)  # a run begun anew may fail sooner
    if not folders:
        raise FileNotFoundError(f"{out_dir} has no nan_step_* folder: no update was kept for replay, because none was not finite")
    return json.loads((folders[-1] / _RECORD).read_text()) | {"folder": str(folders[-1])}


def kept_batch(folder: str | Path, like: PyTree[Array]) -> PyTree[Array]:
    """The batch in a folder of `keep_failure`, in the structure of `like`."""
    with np.load(Path(folder) / _BATCH) as stored:
        return jax.tree.unflatten(jax.tree.structure(like), [stored[f"arr_{n}"] for n in range(len(stored.files))])
