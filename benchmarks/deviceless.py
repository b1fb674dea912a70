"""Compiles programs for an H200 on a machine without a GPU.

XLA's CUDA compiler needs a description of the card, not the card: so the memory that a whole program will take, the copies it will make and the
registers of our kernels can be known, and checked, anywhere. Speed cannot (nothing is tuned), nor numbers, nor cuDNN's kernels.
The method is that of JAX's own tests (jax-ml/jax, tests/aot_test.py).

It takes the compiler's wheels, about 600 MB. `make h200` installs them in a folder of their own and puts that on PYTHONPATH, so that JAX does
not look for a GPU at other times:

    pip install --no-deps --target .cache/cuda jax-cuda12-plugin==V jax-cuda12-pjrt==V nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12
    JAX_PLATFORMS=cpu PYTHONPATH=.cache/cuda python -m benchmarks.h200

with V the version of the installed jax. They must be there when JAX is imported.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jaxtyping import PyTree

_CARD = Path(__file__).with_name("h200.txtpb")
# On the card XLA times its own Triton products against cuBLASLt's. Here nothing is timed and Triton's would always be taken.
_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def available() -> bool:
    """Whether the compiler's wheels are there."""
    return all(_found(name) for name in ("jax_plugins.xla_cuda12", "jax_cuda12_plugin", "nvidia.cuda_nvcc"))


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package above
        return False


@functools.cache
def _sharding() -> jax.sharding.NamedSharding:
    """A mesh of one H200 that nobody has."""
    if not available():
        raise FileNotFoundError("no CUDA compiler on the path: run `make h200`, or see benchmarks/deviceless.py")
    compiler = Path(next(iter(importlib.util.find_spec("nvidia.cuda_nvcc").submodule_search_locations)))
    os.environ.setdefault("CUDA_ROOT", str(compiler))
    os.environ["PATH"] = f"{compiler / 'bin'}{os.pathsep}{os.environ['PATH']}"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what was compiled for a card that is not here cannot be read back
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
    registers: int  # of a thread, at launch
    spilled: int  # bytes stored to and loaded from local memory


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: what it needs and what it does."""

    arguments: int  # bytes; donated ones included
    outputs: int
    aliased: int  # bytes of outputs that take the place of donated arguments
    temporaries: int
    text: str  # the scheduled HLO

    @property
    def peak(self) -> int:
        """Bytes in use at most, all arguments included."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    def copies(self, smallest: int) -> list[str]:
        """Plain copies of at least `smallest` bytes: what XLA adds where it cannot work in place. Fusions that slice or join are not among them."""
        found = []
        moves = r"%(\S*copy(?:-start|_fusion)?[.\d]*) = \(?(\w+)\[([\d,]*)\]"
        for match in re.finditer(moves, self.text[self.text.index("ENTRY ") :]):  # what is inside a fusion moves nothing by itself
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
    compiled = _compile(fn, args, jit_options)
    memory = compiled.memory_analysis()
    return Program(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        compiled.as_text(),
    )


def compile_kernels(fn: Callable, *args: PyTree[Any]) -> tuple[Kernel, ...]:
    """What ptxas says of the Mosaic kernels in `fn(*args)`; a small program, since each use of a kernel is compiled anew for it.

    Raises:
      FileNotFoundError: the compiler's wheels are absent.
    """
    with _ptxas_reports() as folder:
        _compile(fn, args, {})
        kernels = []
        for path in sorted(folder.rglob("*ptxas*")):
            report = path.read_text()
            spilled = sum(int(size) for size in re.findall(r"(\d+) bytes spill", report))
            kernels.append(Kernel(path.name.split(".")[0], int(re.search(r"Used (\d+) registers", report).group(1)), spilled))
    return tuple(kernels)


def _compile(fn, args, jit_options):
    return jax.jit(fn, **jit_options).lower(*placed(args)).compile(_OPTIONS)


@contextlib.contextmanager
def _ptxas_reports() -> Iterator[Path]:
    """While it is open, Mosaic writes into the folder what ptxas says of each kernel."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        settings = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_TO": folder}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)  # it also tries to disassemble and to load the kernel, and complains that it cannot
        try:
            yield Path(folder)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name)
                else:
                    os.environ[name] = value
