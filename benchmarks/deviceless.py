"""Compiles programs for an H200 on a machine without a GPU.

XLA's CUDA compiler needs a description of the card, not the card: so the memory that a whole program will take, the copies it will make and the
registers of our kernels can be known, and checked, anywhere. Speed cannot (nothing is tuned), nor numbers, nor cuDNN's kernels.
The method is that of JAX's own tests (jax-ml/jax, tests/aot_test.py).

It takes the compiler's wheels, about 600 MB, in a folder of their own, so that JAX does not look for a GPU whenever it starts (`make h200`
does this):

    pip install --no-deps --target .cache/cuda jax-cuda12-plugin==V jax-cuda12-pjrt==V nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12

with V the version of the installed jax. PIKASTREAM_CUDA_WHEELS names another folder.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jaxtyping import PyTree

WHEELS = Path(os.environ.get("PIKASTREAM_CUDA_WHEELS", Path(__file__).parent.parent / ".cache" / "cuda"))
_CARD = Path(__file__).with_name("h200.txtpb")
# On the card XLA times its own Triton products against cuBLASLt's. Here nothing is timed and Triton's would always be taken.
_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def available() -> bool:
    """Whether the compiler's wheels are there."""
    return (WHEELS / "jax_plugins").is_dir()


@functools.cache
def _sharding() -> jax.sharding.NamedSharding:
    """A mesh of one H200 that nobody has."""
    if not available():
        raise FileNotFoundError(f"no CUDA compiler in {WHEELS}: run `make h200`, or set PIKASTREAM_CUDA_WHEELS")
    compiler = WHEELS / "nvidia" / "cuda_nvcc"
    os.environ.setdefault("CUDA_ROOT", str(compiler))
    os.environ["PATH"] = f"{compiler / 'bin'}{os.pathsep}{os.environ['PATH']}"
    sys.path.append(str(WHEELS))
    jax.config.update("jax_platforms", "cpu")
    from jax._src import xla_bridge  # no public name: upstream's own test does the same

    logging.disable(logging.ERROR)  # looking for a device logs that there is none
    try:
        xla_bridge.discover_pjrt_plugins()
        topology = topologies.get_topology_desc(platform="cuda", target_config=_CARD.read_text(), topology="1x1x1")
    finally:
        logging.disable(logging.NOTSET)
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("device",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of one of our kernels."""

    name: str
    registers: int  # of a thread
    spilled: int  # bytes stored to and loaded from local memory
    shared: int  # bytes of static shared memory


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: what it needs and what it does."""

    arguments: int  # bytes; donated ones included
    outputs: int
    aliased: int  # bytes of outputs that take the place of donated arguments
    temporaries: int
    text: str  # the scheduled HLO
    kernels: tuple[Kernel, ...]

    @property
    def peak(self) -> int:
        """Bytes in use at most, all arguments included."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    def copies(self, smallest: int) -> list[str]:
        """Names of plain copies of at least `smallest` bytes, also where a fusion does nothing but copy."""
        found = []
        for match in re.finditer(r"%(\S*copy\S*) = (\w+)\[([\d,]*)\]", self.text):
            name, kind, shape = match.groups()
            size = functools.reduce(lambda total, n: total * int(n), filter(None, shape.split(",")), _BYTES.get(kind, 4))
            if size >= smallest:
                found.append(f"{name} {kind}[{shape}]")
        return found


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8, "u64": 8}


def placed(tree: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes of the tree's arrays, said to lie on the H200."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding()), tree)


def compile_program(fn: Callable, *args: PyTree[Any], **jit_options: Any) -> Program:
    """`fn(*args)` for an H200.

    Args:
      args: pytrees of arrays or shapes.
      jit_options: as for `jax.jit`, for example `donate_argnums`.

    Raises:
      FileNotFoundError: the compiler's wheels are absent.
    """
    args = placed(args)
    with _ptxas_reports() as reports:
        compiled = jax.jit(fn, **jit_options).lower(*args).compile(_OPTIONS)
        kernels = tuple(reports())
    memory = compiled.memory_analysis()
    return Program(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        compiled.as_text(),
        kernels,
    )


@contextlib.contextmanager
def _ptxas_reports() -> Iterator[Callable[[], Iterator[Kernel]]]:
    """While it is open, Mosaic writes what ptxas says of each kernel; the function it gives reads that."""
    settings = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_PTX": "1"}
    with tempfile.TemporaryDirectory() as folder:
        before = {name: os.environ.get(name) for name in (*settings, "MOSAIC_GPU_DUMP_TO")}
        os.environ.update(settings, MOSAIC_GPU_DUMP_TO=folder)

        def read() -> Iterator[Kernel]:
            for path in sorted(Path(folder).rglob("*ptxas*")):
                report = path.read_text()
                numbers = [
                    re.search(pattern, report) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes smem")
                ]
                found = [int(match.group(1)) if match else 0 for match in numbers]
                yield Kernel(path.name.split(".")[0], *found)

        try:
            yield read
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name)
                else:
                    os.environ[name] = value
