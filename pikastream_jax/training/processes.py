"""Several processes train as one: what they must agree on, and what only the first of them does.

All processes run the same program on the same arguments. Files other than checkpoints are the first one's; checkpoints are written by all, to a
folder that all of them see.
"""

import atexit
import contextlib
import dataclasses
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from jaxtyping import PyTree

from pikastream_jax.nn.placement import DATA, FSDP, SEQUENCE


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of how many processes this is."""

    coordinator: str | None  # HOST:PORT of the first process
    count: int
    index: int | None

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"--processes {self.count} must be at least 1")
        if self.count == 1 and (self.coordinator, self.index) != (None, None):
            raise ValueError("--coordinator and --process are for several processes: say how many with --processes")
        if self.count > 1 and (self.coordinator is None or self.index is None):
            raise ValueError(f"--processes {self.count} needs --coordinator HOST:PORT and --process I in each of them")
        if self.count > 1 and not 0 <= self.index < self.count:
            raise ValueError(f"--process {self.index} must lie in 0-{self.count - 1}")

    def join(self) -> None:
        """Waits for the others. Before anything touches a device.

        Raises:
          ValueError: the others did not come.
        """
        if self.count == 1:
            return
        try:
            jax.distributed.initialize(self.coordinator, num_processes=self.count, process_id=self.index)
        except RuntimeError as error:
            raise ValueError(f"process {self.index} of {self.count} found no others at {self.coordinator}: {error}") from error


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def passing_folder() -> Path:
    """A folder for what another process writes as well; it is gone when this one ends."""
    folder = Path(tempfile.mkdtemp(prefix="pikastream-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask, in the same order, as the answer is a message between them."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def gather(tree: PyTree[jax.Array]) -> PyTree:
    """Every leaf whole in this process. All must call it."""
    return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def host_device() -> jax.Device:
    """Host memory, where it has a device; this process's first where it has none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the GPU alone
        return jax.local_devices()[0]


def on_the_host() -> contextlib.AbstractContextManager:
    """What is computed within lies on `host_device`: a model that needs many GPUs does not begin on one."""
    return jax.default_device(host_device())


def on_one_device() -> contextlib.AbstractContextManager:
    """Among several processes, what is computed within runs in this one alone, on its first device."""
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    device = np.array(jax.local_devices()[:1]).reshape(1, 1, 1)
    return jax.set_mesh(Mesh(device, (DATA, FSDP, SEQUENCE), axis_types=(AxisType.Auto,) * 3))
