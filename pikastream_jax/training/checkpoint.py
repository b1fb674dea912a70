"""Checkpoints of a run, through orbax: the last two, each whole or absent. And weights for the stage that follows.

`python -m pikastream_jax.training.checkpoint --run runs/dit --out dit.safetensors` keeps a run's averaged weights alone, a third of
its checkpoint, to carry them to another machine.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
import tyro

from pikastream_jax.weights import safetensors_io

CHECKPOINTS = "checkpoints"  # within a run folder
_STATE = "state"  # the name of the file set within an orbax checkpoint


class Checkpoints:
    """The checkpoints of one run folder.

    The state's leaves are stored under their tree paths, so the file does not depend on how optax nests its tuples in a
    given version beyond the names, and a misfit can be reported by name.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2, write: bool = True):
        """write: False only reads, and leaves alone what another process may be saving there."""
        self.directory = Path(directory).absolute()  # orbax refuses relative paths
        if write:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=write,  # what a killed save left behind
        )

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Writes `state` (a pytree of arrays) and `record` (JSON) as the checkpoint of `step`; returns once on disk."""
        self._checkpointer.save_checkpointables(step, {_STATE: _by_path(state)}, custom_metadata=record, force=True)

    def record(self, step: int) -> dict[str, Any]:
        """The JSON object saved beside the state of `step`."""
        return self._checkpointer.checkpointables_metadata(step).custom_metadata

    def restore(self, step: int, like: Any) -> Any:
        """Reads the state of `step` into the structure of `like`.

        Args:
          step: a saved step.
          like: pytree of `jax.ShapeDtypeStruct`s, whose shardings say where the leaves shall lie, whatever mesh they were
            saved from; without one, on this process's first device.

        Raises:
          ValueError: the stored leaves are not those of `like`, each difference named.
        """
        wanted = _by_path(like)
        stored = self._checkpointer.checkpointables_metadata(step).metadata[_STATE]
        problems = [f"missing {name}" for name in wanted if name not in stored]
        problems += [f"unexpected {name}" for name in stored if name not in wanted]
        problems += [
            f"{name} is {tuple(stored[name].shape)}, expected {tuple(leaf.shape)}"
            for name, leaf in wanted.items()
            if name in stored and tuple(stored[name].shape) != tuple(leaf.shape)
        ]
        if problems:
            raise ValueError(
                f"checkpoint {self.path(step)} does not fit this stage: {'; '.join(problems)}. "
                "Use the configuration it was made with, or another run folder."
            )
        abstract = {name: _here(leaf) if leaf.sharding is None else leaf for name, leaf in wanted.items()}
        loaded = self._checkpointer.load_checkpointables(step, {_STATE: abstract})[_STATE]
        return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in wanted])

    def ema(self, step: int) -> safetensors_io.Params:
        """The averaged parameters of `step` as a nested dict, in host memory."""
        stored = self._checkpointer.checkpointables_metadata(step).metadata[_STATE]
        # ... stands for a leaf to leave on the disk.
        abstract = {name: _here(leaf) if name.startswith("ema.") else ... for name, leaf in stored.items()}
        loaded = jax.device_get(self._checkpointer.load_checkpointables(step, {_STATE: abstract})[_STATE])
        return safetensors_io.unflatten(
            {name.removeprefix("ema."): leaf for name, leaf in loaded.items() if leaf is not ...}
        )

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def close(self) -> None:
        self._checkpointer.close()


def load_weights(path: str | os.PathLike[str]) -> safetensors_io.Params:
    """Weights to start a stage from.

    Args:
      path: a safetensors file, or a run folder: the averaged (EMA) parameters of its newest checkpoint.

    Returns:
      Nested dict of arrays; pass it through `safetensors_io.restore_into` to check it against a model.

    Raises:
      FileNotFoundError: there is no such file or folder, or the folder has no checkpoint.
      ValueError: the file is not readable.
    """
    path = Path(path)
    if not path.is_dir():
        return safetensors_io.load(path)[0]
    if not (path / CHECKPOINTS).is_dir():
        raise FileNotFoundError(f"{path} is not a run folder: it has no {CHECKPOINTS}/")
    checkpoints = Checkpoints(path / CHECKPOINTS, write=False)
    try:
        if checkpoints.latest_step is None:
            raise FileNotFoundError(f"{path} has no checkpoint yet: train it first")
        return checkpoints.ema(checkpoints.latest_step)
    finally:
        checkpoints.close()


def _by_path(tree: Any) -> dict[str, Any]:
    """{tree path joined by dots: leaf}, in the tree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _here(leaf: Any) -> jax.ShapeDtypeStruct:
    """How to load a leaf: on this process's first device, wherever the run that saved it had it."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Keep the averaged weights of a run's newest checkpoint, to start another run from: --init NAME=FILE."""

    run: Path
    """Folder of the run."""
    out: Path
    """File to write, .safetensors, float32."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    safetensors_io.save(arguments.out, load_weights(arguments.run), dtype=jnp.float32)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
