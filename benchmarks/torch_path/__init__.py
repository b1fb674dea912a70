"""The PyTorch twin of FlashVAE and the DiT: it proves the JAX models right on a CPU and races them on a GPU.

It reads the same safetensors files and computes the same functions (`tests/parity` holds both against each other), but it shares no
code with them beyond the configuration, and imports no JAX. `build` gives a stream ready to run, `build_decoder` FlashVAE's decoder
alone; `compile`, then `capture` make either fast. On CPUs everything but the graphs has run, compiled too. The CUDA paths (graphs,
cuDNN attention, `torch._scaled_mm` by rows) were written without a GPU at hand: never executed.
"""

from benchmarks.torch_path.decoder import Decoder
from benchmarks.torch_path.stream import Stream, build, build_decoder

__all__ = ["Decoder", "Stream", "build", "build_decoder"]
