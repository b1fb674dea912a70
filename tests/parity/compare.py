"""What the parity tests share: the comparison, and the twin of a JAX module."""

import jax
import numpy as np
import torch

from benchmarks.torch_path.weights import load
from pikastream_jax.nn.layers import Params
from pikastream_jax.weights.safetensors_io import flatten

LIMIT = 1e-4
WORST: dict[str, float] = {}  # by comparison, over a whole run


def close(name: str, twin: torch.Tensor, ours: jax.Array, limit: float = LIMIT) -> None:
    """Asserts that max |twin - ours| / max |ours| is at most `limit`, and notes it."""
    a, b = twin.detach().float().numpy(), np.asarray(ours)
    assert a.shape == b.shape, f"{name}: {a.shape} and {b.shape}"
    assert np.isfinite(b).all() and np.abs(b).max() > 1e-2, f"{name}: nothing to compare"
    error = float(np.abs(a - b).max() / np.abs(b).max())
    WORST[name] = max(error, WORST.get(name, 0.0))
    assert error <= limit, f"{name}: relative error {error:.2e} exceeds {limit}"


def to_torch(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


def filled(module: torch.nn.Module, params: Params) -> torch.nn.Module:
    """The twin with the parameters of its JAX module."""
    load(module, {name: to_torch(leaf) for name, leaf in flatten(params).items()})
    return module.requires_grad_(False)
