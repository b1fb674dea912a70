"""The project's safetensors files into the twin's modules, and random weights of any size.

A file names a parameter by its path in the JAX modules (`pikastream_jax/weights/safetensors_io.py`). The twin's modules have the same
paths; what differs is in one table: matrices are stored [in, out] there and [out, in] here, and projections of the same input are
one product here.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

# Regex of a name in the file -> the twin's name; the second group says which part of a fused parameter it is, in the order q, k, v.
_FUSED = (
    (r"(.*self_attention)\.([qkv])\.(kernel|bias)", r"\1.qkv.\3"),
    (r"(.*(?:text|audio)_attention)\.([kv])\.(kernel|bias)", r"\1.kv.\3"),
)
_LEAVES = {"kernel": "weight", "scale": "weight"}


def _twin(name: str) -> tuple[str, str]:
    """A name in the file -> the twin's name before its leaf is renamed, and the part of it."""
    for pattern, target in _FUSED:
        if match := re.fullmatch(pattern, name):
            return match.expand(target), match[2]
    return name, ""


def convert(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by their name in a file -> a state dict of the twin's modules."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        twin, part = _twin(name)
        path, dot, leaf = twin.rpartition(".")
        parts.setdefault(path + dot + _LEAVES.get(leaf, leaf), {})[part] = tensor.T if leaf == "kernel" else tensor
    # "qkv" holds the parts in their order.
    return {name: torch.cat([named[part] for part in sorted(named, key="qkv".index)]) for name, named in parts.items()}


def load(module: nn.Module, flat: Mapping[str, Tensor]) -> None:
    """Fills a module, on whatever device and in whatever dtype it is.

    Raises:
      RuntimeError: naming missing and unexpected parameters and wrong shapes.
    """
    module.load_state_dict(convert(flat))


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """One part of a weights file: denoiser, flash_vae or statistics, without that prefix in the names."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{part}.")]
        return {name.removeprefix(f"{part}."): file.get_tensor(name) for name in names}


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep signals alive, gates and output projections included: a speed run must not multiply zeros."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


def parameter_count(module: nn.Module) -> int:
    """Number of parameters; works on the meta device too."""
    return sum(parameter.numel() for parameter in module.parameters())
