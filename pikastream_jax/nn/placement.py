"""Where activations lie when a program runs on a mesh of devices: rows over `data` and `fsdp`, latent frames over `sequence`.

Without a mesh (`jax.set_mesh`), as in serving, nothing here changes a program.
"""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

DATA, FSDP, SEQUENCE = "data", "fsdp", "sequence"  # the axes of a training mesh, see `training/mesh.py`
ROWS = (DATA, FSDP)  # a batch is split over both: each device of an fsdp group computes on rows of its own


def axis_sizes() -> dict[str, int]:
    """Devices along each axis of the mesh that the program is traced for; empty without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(mesh.shape)


def place_frames(x: Float[Array, "b f ..."]) -> Float[Array, "b f ..."]:
    """Rows and latent frames split over the mesh, everything else whole.

    Said before every block: left to itself, the partitioner may split the features of what the weights' splitting touches.
    An axis that its devices do not divide (the reference's one latent frame, a few rows to draw) stays whole.
    """
    return _place(x, split_frames=True)


def gather_frames(x: Float[Array, "b f ..."]) -> Float[Array, "b f ..."]:
    """Every latent frame's keys or values on each device of a sequence group, for queries that are split over it."""
    return _place(x, split_frames=False) if axis_sizes().get(SEQUENCE, 1) > 1 else x


def _place(x: Array, split_frames: bool) -> Array:
    sizes = axis_sizes()
    if not sizes:
        return x
    rows = None if x.shape[0] % (sizes[DATA] * sizes[FSDP]) else ROWS
    frames = SEQUENCE if split_frames and x.shape[1] % sizes[SEQUENCE] == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, frames))
