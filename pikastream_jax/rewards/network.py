"""Layers that the reward models share.

Rewards are climbed by gradient, so everything is smooth: strides instead of pooling by maximum, GELU instead of ReLU.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.nn.patch import patchify


class Calibration(nnx.Module):
    """Puts a score on the scale of true clips: zero mean and unit variance over held-out ones.

    Both numbers are measured while a reward is trained and stored with its weights; no gradient moves them.
    """

    def __init__(self):
        self.mean = nnx.Param(jnp.zeros(()))
        self.std = nnx.Param(jnp.ones(()))

    def __call__(self, raw: Float[Array, " b"]) -> Float[Array, " b"]:
        return (raw - jax.lax.stop_gradient(self.mean[...])) / jax.lax.stop_gradient(self.std[...])


class Halve(nnx.Module):
    """Halves the grid each way: normalise, 3x3 convolution, GELU."""

    def __init__(self, channels_in: int, channels_out: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(channels_in, rngs=rngs)
        self.conv = nnx.Conv(channels_in, channels_out, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n i j d"]:
        return jax.nn.gelu(self.conv(self.norm(x)))


class Trunk(nnx.Module):
    """Pixels -> one vector: patches, convolutions that halve the grid, and a layer over all of it.

    The last grid is flattened, not averaged: rewards ask what mouth and eyes do, and faces stand in the middle of the picture.
    """

    def __init__(self, height: int, width: int, planes: int, patch: int, channels: tuple[int, ...], dim: int, *, rngs: nnx.Rngs):
        """Args:
        planes: numbers per pixel, 3 for one colour picture.
        patch: pixels each way of a patch.
        channels: of the patches and of each grid after them, each half as fine as the one before.
        dim: of the vector.
        """
        self.size = patch
        self.patch = nnx.Linear(patch * patch * planes, channels[0], rngs=rngs)  # on a CPU three times as fast as a convolution with strides
        self.halves = nnx.List([Halve(a, b, rngs=rngs) for a, b in zip(channels[:-1], channels[1:], strict=True)])
        rows, columns = height // patch, width // patch
        for _ in channels[1:]:
            rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
        self.norm = nnx.LayerNorm(channels[-1], rngs=rngs)
        self.out = nnx.Linear(rows * columns * channels[-1], dim, rngs=rngs)

    def __call__(self, pixels: Float[Array, "n h w c"]) -> Float[Array, "n d"]:
        n, h, w, _ = pixels.shape
        x = jax.nn.gelu(self.patch(patchify(pixels, self.size))).reshape(n, h // self.size, w // self.size, -1)
        for half in self.halves:
            x = half(x)
        return self.out(self.norm(x).reshape(len(x), -1))


def halved(pictures: Float[Array, "*b h w 3"]) -> Float[Array, "*b i j 3"]:
    """Half the size each way by the mean of 2x2 pixels."""
    *batch, h, w, c = pictures.shape
    return pictures.reshape(*batch, h // 2, 2, w // 2, 2, c).mean(axis=(-4, -2))


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Vectors of length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
