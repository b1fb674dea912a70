"""Checkpoints of a run, through orbax: the last few, each whole or absent. And weights for the stage that follows.

`python -m pikastream_jax.training.checkpoint --run runs/dit --out dit.safetensors` keeps a run's averaged weights alone, a third of
its checkpoint, to carry them to another machine.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
import tyro

from pikastream_jax.training.processes import host_device
from pikastream_jax.weights import safetensors_io

CHECKPOINTS = "checkpoints"  # within a run folder
_STATE = "state"  # the name of the file set within an orbax checkpoint


class Checkpoints:
    """The checkpoints of one run folder.

    The state's leaves are stored under their tree paths, so the file does not depend on how optax nests its tuples in a
    given version beyond the names, and a misfit can be reported by name.

    Saving takes a copy of the state and returns; the files are written while training goes on. A save that fails (a full disk)
    is an OSError at the next `check`, `wait` or `save`; what was saved before stays as it is, for the oldest checkpoint is only removed
    once a newer one is whole.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2, write: bool = True):
        """
        Args:
          directory: made if missing.
          keep: how many checkpoints stay, the newest.
          write: False only reads, and leaves alone what another process may be saving there.

        Raises:
          ValueError: `keep` is below 1.
          OSError: the folder cannot be made.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
        self.directory = Path(directory).absolute()  # orbax refuses relative paths
        if write:
            self.directory.mkdir(parents=True, exist_ok=True)
        logging.getLogger("absl").addFilter(_not_of_orbax)
        self._saving: int | None = None  # the step whose save has not been waited for
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=write,  # what a killed save left behind
        )

    @property
    def latest_step(self) -> int | None:
        """The newest whole checkpoint, a save under way not counted."""
        whole = [checkpoint.step for checkpoint in self._checkpointer.checkpoints if checkpoint.step != self._saving]
        return max(whole, default=None)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts to write `state` (a pytree of arrays) and `record` (JSON) as the checkpoint of `step`; `state` may be donated at once.

        Raises:
          OSError: this save or the one before could not be written.
        """
        self.wait()
        with self._named(step):
            self._checkpointer.save_checkpointables_async(
                step, {_STATE: _by_path(state)}, custom_metadata=record, force=True
            )
        self._saving = step

    def check(self) -> None:
        """Raises the OSError of a save that has failed by now; waits for nothing."""
        if self._saving is not None and not self._checkpointer.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns once the save under way is on the disk.

        Raises:
          OSError: it could not be written.
        """
        step, self._saving = self._saving, None
        if step is not None:
            with self._named(step):
                self._checkpointer.wait()

    @contextlib.contextmanager
    def _named(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tensorstore's errors for what the system refuses are ValueErrors, orbax's are several
            self._checkpointer.reload()  # orbax had struck off what the new checkpoint would have taken the place of
            before = self.latest_step
            kept = "no checkpoint before it" if before is None else f"{self.path(before)} is whole"
            raise OSError(
                f"cannot write the checkpoint {self.path(step)} ({_first_line(error)}); {kept}: "
                "make room and run the same command again"
            ) from error

    def record(self, step: int) -> dict[str, Any]:
        """The JSON object saved beside the state of `step`.

        Raises:
          ValueError: it cannot be read.
        """
        with self._readable(step):
            return self._checkpointer.checkpointables_metadata(step).custom_metadata

    def restore(self, step: int, like: Any) -> Any:
        """Reads the state of `step` into the structure of `like`.

        Args:
          step: a saved step.
          like: pytree of `jax.ShapeDtypeStruct`s, whose shardings say where the leaves shall lie, whatever mesh they were
            saved from; without one, on this process's first device.

        Raises:
          ValueError: the stored leaves are not those of `like`, each difference named; or they cannot be read.
        """
        wanted = _by_path(like)
        stored = self._stored(step)
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
        here = jax.local_devices()[0]
        abstract = {name: _on(here, leaf) if leaf.sharding is None else leaf for name, leaf in wanted.items()}
        with self._readable(step):
            loaded = self._checkpointer.load_checkpointables(step, {_STATE: abstract})[_STATE]
        return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in wanted])

    def ema(self, step: int) -> safetensors_io.Params:
        """The averaged parameters of `step` as a nested dict, in host memory.

        Raises:
          ValueError: they cannot be read.
        """
        # ... stands for a leaf to leave on the disk.
        abstract = {name: _on(host_device(), leaf) if name.startswith("ema.") else ... for name, leaf in self._stored(step).items()}
        with self._readable(step):
            loaded = jax.device_get(self._checkpointer.load_checkpointables(step, {_STATE: abstract})[_STATE])
        return safetensors_io.unflatten(
            {name.removeprefix("ema."): leaf for name, leaf in loaded.items() if leaf is not ...}
        )

    def _stored(self, step: int) -> dict[str, Any]:
        """{tree path: shape and dtype} of the leaves of `step`."""
        with self._readable(step):
            stored = self._checkpointer.checkpointables_metadata(step).metadata[_STATE]
            if stored is None:
                raise ValueError("its list of arrays is torn")
            return stored

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever kind the file that is missing or torn makes of it
            raise ValueError(
                f"the checkpoint {self.path(step)} cannot be read ({_first_line(error)}): "
                "copy it again, or remove that folder to go on from the one before it"
            ) from error

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def close(self) -> None:
        """Finishes the save under way; see `wait`."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()


def load_weights(path: str | os.PathLike[str], part: str = "") -> safetensors_io.Params:
    """Weights to start a stage from.

    Args:
      path: a safetensors file, or a run folder: the averaged (EMA) parameters of its newest checkpoint.
      part: of a file with several models, such as the shipped one, the one that is wanted: denoiser or flash_vae.

    Returns:
      Nested dict of arrays; pass it through `safetensors_io.restore_into` to check it against a model.

    Raises:
      FileNotFoundError: there is no such file or folder, or the folder has no checkpoint.
      ValueError: the file is not readable.
    """
    path = Path(path)
    if not path.is_dir():
        weights, header = safetensors_io.load(path)
        return weights[part] if part in weights and "pikastream" in header else weights
    with _newest(path) as (checkpoints, step):
        return checkpoints.ema(step)


def updates_done(run: str | os.PathLike[str]) -> int:
    """Updates that a run folder's newest checkpoint has behind it.

    Raises:
      FileNotFoundError: it is no run folder, or has no checkpoint.
    """
    with _newest(Path(run)) as (_, step):
        return step


def newest_record(run: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
    """How many updates a run folder's newest checkpoint has behind it, and the JSON object saved beside it.

    Raises:
      FileNotFoundError: it is no run folder, or has no checkpoint.
      ValueError: the object cannot be read.
    """
    with _newest(Path(run)) as (checkpoints, step):
        return step, checkpoints.record(step)


@contextlib.contextmanager
def _newest(run: Path) -> Iterator[tuple[Checkpoints, int]]:
    if not (run / CHECKPOINTS).is_dir():
        raise FileNotFoundError(f"{run} is not a run folder: it has no {CHECKPOINTS}/")
    checkpoints = Checkpoints(run / CHECKPOINTS, write=False)
    try:
        if (step := checkpoints.latest_step) is None:
            raise FileNotFoundError(f"{run} has no checkpoint yet: train it first")
        yield checkpoints, step
    finally:
        checkpoints.close()


def _by_path(tree: Any) -> dict[str, Any]:
    """{tree path joined by dots: leaf}, in the tree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Keeps out of the log what orbax says of a save that failed, hundreds of lines of it: `Checkpoints` raises the error itself."""
    return "orbax" not in record.pathname


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _on(device: jax.Device, leaf: Any) -> jax.ShapeDtypeStruct:
    """How to load a leaf: on that device, wherever the run that saved it had it."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(device))


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
