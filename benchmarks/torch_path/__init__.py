"""The PyTorch twin of FlashVAE and the DiT: it proves the JAX models right on a CPU and races them on a GPU.

It reads the same safetensors files and computes the same functions (`tests/parity` holds both against each other), but it shares no
code with them beyond the configuration, and imports no JAX. `build` gives a stream ready to run; `Stream.compile` and `Stream.capture`
make it fast. Its CUDA paths (CUDA graphs, cuDNN attention, `torch._scaled_mm` by rows) were written without a GPU at hand: never
executed there yet.
"""

from benchmarks.torch_path.stream import Stream, build

__all__ = ["Stream", "build"]
