"""The straight path between latents and noise (flow matching, Lipman et al. 2023; rectified flow, Liu et al. 2023)."""

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from pikastream_jax.config import StreamConfig


def interpolate(clean: Float[Array, "b f *x"], noise: Float[Array, "b f *x"], t: Float[Array, "b f"]) -> Float[Array, "b f *x"]:
    """x_t of every latent frame at its own timestep."""
    t = t.reshape(*t.shape, *(1,) * (clean.ndim - t.ndim))
    return (1.0 - t) * clean + t * noise


def shift_timestep(t: Float[Array, "*b"], shift: float) -> Float[Array, "*b"]:
    """Moves timesteps towards noise: shift t / (1 + (shift - 1) t) (Esser et al. 2024). More tokens want a larger shift."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def solver_timesteps(steps: int, shift: float) -> np.ndarray:
    """The timesteps at which the network is evaluated, from 1 down, and the final 0: [steps + 1], float32.

    >>> solver_timesteps(4, 5.0).round(4).tolist()
    [1.0, 0.9375, 0.8333, 0.625, 0.0]
    """
    uniform = 1.0 - np.arange(steps + 1) / steps
    return np.asarray(shift_timestep(uniform, shift), np.float32)


def passes(stream: StreamConfig) -> tuple[Float32[np.ndarray, "passes f"], Float32[np.ndarray, "passes f"]]:
    """Timesteps before and after every forward pass that a chunk takes, for each of the `stream.in_flight` latent frames.

    Sequential: `steps` passes over one chunk. Rolling (StreamDiT, https://arxiv.org/abs/2507.03745; Rolling Forcing,
    https://arxiv.org/abs/2509.25161): one pass over `steps` chunks, each a step noisier than the one before it; the first leaves it clean.
    """
    times = solver_timesteps(stream.steps, stream.shift)
    if stream.rolling:
        return np.repeat(times[-2::-1], stream.chunk)[None], np.repeat(times[:0:-1], stream.chunk)[None]
    return np.repeat(times[:-1, None], stream.chunk, axis=1), np.repeat(times[1:, None], stream.chunk, axis=1)


def logit_normal_timesteps(key: Array, shape: tuple[int, ...], shift: float) -> Float[Array, "..."]:
    """Training timesteps: logit-normal (Esser et al. 2024), then shifted."""
    return shift_timestep(jax.nn.sigmoid(jax.random.normal(key, shape)), shift)
