"""Gradient accumulation: the gradient of a batch whose activations don't fit at once, as the mean over slices of it.

One update stays one update: its batch, its key, its place in the schedule and in the average are what they are without slices, so a
run's position is still its step number. (`optax.MultiSteps` would spread an update over several steps of the loop instead.)
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from pikastream_jax.nn.placement import ROWS, axis_sizes

Losses = Callable[..., tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


def mean_gradient(losses: Losses, slices: int) -> Callable[..., tuple[PyTree[Array], dict[str, Float[Array, ""]]]]:
    """`jax.grad(losses, has_aux=True)`, taken over `slices` equal parts of the batch one after another.

    Equal to the gradient of the whole batch where the loss is a mean over rows; a loss that divides by a count of its own (of
    unmasked frames, say) becomes the mean of the slices' losses. Slice i holds the rows i, i + slices, ..., so that a batch
    split over devices in contiguous parts is not moved between them.

    Args:
      losses: (params, batch, key, *rest) -> (loss, metrics), both means over the rows of `batch`.
      slices: 1 takes the batch as it is.

    Returns:
      (params, batch, key, *rest) -> (gradient, metrics), `batch` a pytree of arrays [rows, ...]. With more slices than one each has a key of
      its own; the metrics are the slices' means.

    Raises:
      ValueError: `slices` is below 1, or (when called) does not divide the batch so that the devices divide a slice.
    """
    if slices < 1:
        raise ValueError(f"accumulate must be at least 1, got {slices}")
    gradient_of = jax.grad(losses, has_aux=True)
    if slices == 1:
        return gradient_of

    def mean(params: PyTree[Array], batch: PyTree[Array], key: Key[Array, ""], *rest: Any):
        def split(leaf):
            rows = leaf.shape[0]
            devices = math.prod(axis_sizes().get(axis, 1) for axis in ROWS)
            if rows % (slices * devices):
                raise ValueError(
                    f"a batch of {rows} does not divide into {slices} slices, each split over {devices} device{'s' * (devices > 1)}: change batch or accumulate"
                )
            return jnp.swapaxes(leaf.reshape(rows // slices, slices, *leaf.shape[1:]), 0, 1)

        def add(total, piece):
            part, part_key = piece
            return jax.tree.map(jnp.add, total, gradient_of(params, part, part_key, *rest)), None

        pieces = jax.tree.map(split, batch), jax.random.split(key, slices)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient_of, params, jax.tree.map(lambda leaf: leaf[0], pieces[0]), key, *rest),
        )
        total, _ = jax.lax.scan(add, zeros, pieces)
        return jax.tree.map(lambda leaf: leaf / slices, total)

    return mean
