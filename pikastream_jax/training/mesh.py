"""Data parallelism: the batch is split over all devices, the state is a copy on each.

A CPU can pose as several devices (`train.py --cpu-devices 2`), which is how this is tried where there is one GPU or none.
"""

from typing import TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def data_mesh() -> Mesh:
    """All devices in one axis, `data`."""
    return jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))


def replicated() -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(data_mesh(), PartitionSpec())


def replicate(tree: Tree) -> Tree:
    """A copy of every leaf on every device."""
    return jax.device_put(tree, replicated())


def split_batch(tree: Tree) -> Tree:
    """Inside jit: every leaf's leading axis is split over the devices.

    Raises:
      ValueError: a batch that the devices don't divide.
    """
    devices = len(jax.devices())
    for leaf in jax.tree.leaves(tree):
        if leaf.shape[0] % devices:
            raise ValueError(f"a batch of {leaf.shape[0]} does not divide over {devices} devices: change one of them")
    return jax.lax.with_sharding_constraint(tree, NamedSharding(data_mesh(), PartitionSpec("data")))
