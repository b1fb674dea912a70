"""One GPU or many: a mesh `data` x `fsdp` x `sequence`, and where state and batches lie on it.

Rows of a batch are split over `data` and `fsdp`; parameters, their average and the optimiser's state over `fsdp` alone, so that a group of that
many devices holds one copy of the model (ZeRO 3; Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054); the latent frames of long clips
over `sequence`. XLA places the rest and adds the communication. A CPU can pose as several devices (`train.py --cpu-devices 8`), which is how
this is tried where there is one GPU or none.
"""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from pikastream_jax.nn.placement import DATA, FSDP, ROWS, SEQUENCE, axis_sizes

Tree = TypeVar("Tree")
AXES = (DATA, FSDP, SEQUENCE)
SMALL = 2**16  # leaves of fewer elements are whole everywhere: gathering them would cost more time than they cost memory


def make_mesh(fsdp: int = 1, sequence: int = 1, devices: int | None = None) -> Mesh | AbstractMesh:
    """All devices of all processes; what `fsdp` and `sequence` leave is the `data` axis.

    Args:
      devices: how many there would be, to plan for devices that are not there: the mesh then is an abstract one.

    Raises:
      ValueError: the devices are not a multiple of fsdp x sequence.
    """
    count = len(jax.devices()) if devices is None else devices
    if fsdp < 1 or sequence < 1 or count % (fsdp * sequence):
        raise ValueError(
            f"fsdp {fsdp} x sequence {sequence} does not divide {count} devices: choose sizes of at least 1 whose product does"
        )
    shape, types = (count // (fsdp * sequence), fsdp, sequence), (AxisType.Auto,) * 3
    if devices is not None:
        return AbstractMesh(shape, AXES, axis_types=types)
    return jax.make_mesh(shape, AXES, axis_types=types)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh | AbstractMesh, state: PyTree) -> PyTree[NamedSharding]:
    """Where every leaf of a training state lies: split over `fsdp` along the largest axis that it divides (the last of equals), small leaves whole.

    Args:
      state: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: a leaf that is not small has no such axis.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        found = _split(mesh, leaf)
        if found is None:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"fsdp {mesh.shape[FSDP]} divides no axis of {name} {tuple(leaf.shape)}: choose one that divides the model's width")
        return found

    return jax.tree_util.tree_map_with_path(place, state)


def data_shardings(mesh: Mesh | AbstractMesh, data: PyTree) -> PyTree[NamedSharding]:
    """Where what every update reads lies: weights of frozen models, and whatever else is large, split as a training state is; what has no axis that
    `fsdp` divides is whole everywhere."""
    return jax.tree.map(lambda leaf: _split(mesh, leaf) or replicated(mesh), data)


def _split(mesh: Mesh | AbstractMesh, leaf: Any) -> NamedSharding | None:
    fsdp = mesh.shape[FSDP]
    shape = np.shape(leaf)
    if fsdp == 1 or math.prod(shape) < SMALL:
        return replicated(mesh)
    size, axis = max((size, axis) if size % fsdp == 0 else (0, axis) for axis, size in enumerate(shape))
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, FSDP)) if size else None


def placed(mesh: Mesh | AbstractMesh, state: PyTree[jax.ShapeDtypeStruct]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and dtypes with the shardings of `state_shardings`, which also says what raises."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, state_shardings(mesh, state)
    )


def put(tree: PyTree, shardings: PyTree[NamedSharding]) -> PyTree:
    """The leaves, each whole in this process, as arrays that lie as `shardings` say: every process gives its devices their parts.

    Each leaf gets memory of its own, so that a state which names one array twice can be donated.
    """

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.array(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree, shardings)


def put_batch(tree: Tree, mesh: Mesh) -> Tree:
    """A batch on the host as arrays whose rows are split over the devices: every process passes the whole of it and gives its devices their rows.

    Raises:
      ValueError: a batch that the devices don't divide.
    """
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, _checked(leaf, mesh.shape), leaf.shape), tree
    )


def split_batch(tree: Tree) -> Tree:
    """Inside jit: every leaf's leading axis is split over `data` and `fsdp` of the mesh that the program runs on, if any.

    Raises:
      ValueError: a batch that the devices don't divide.
    """
    sizes = axis_sizes()
    if not sizes:
        return tree
    tree = jax.tree.map(lambda leaf: _checked(leaf, sizes), tree)
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(ROWS))


def split_stack(stack: jax.Array) -> jax.Array:
    """Inside jit: independent matrices [matrices, in, out], filled up with zeros to a multiple of all devices and split over them."""
    sizes = axis_sizes()
    if not sizes:
        return stack
    filled = jnp.pad(stack, ((0, -len(stack) % math.prod(sizes.values())), (0, 0), (0, 0)))
    return jax.lax.with_sharding_constraint(filled, PartitionSpec(AXES))


def _checked(leaf: Any, sizes: Any) -> Any:
    rows = sizes[DATA] * sizes[FSDP]
    if leaf.shape[0] % rows:
        raise ValueError(
            f"a batch of {leaf.shape[0]} does not divide over data {sizes[DATA]} x fsdp {sizes[FSDP]} = {rows} devices: "
            "change it, or give devices to --sequence"
        )
    return leaf
