"""The optimiser of every stage: Muon for hidden matrices, AdamW for the rest, one learning rate for both; or AdamW for everything.

Muon (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of a weight matrix.
It is meant for the matrices between hidden layers; embeddings, input and output projections, norms, biases and
modulation tables keep AdamW. With `consistent_rms=0.2` (Liu et al., 2025, https://arxiv.org/abs/2502.16982) a Muon
update has the size of a typical AdamW update, so one learning rate serves both groups.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, PyTree

from pikastream_jax.training.mesh import split_stack

# Parts of a path that mark a matrix as an input, output, embedding or modulation one. The attention to prompts is with them because
# what a prompt changes is little: Muon makes the gradient's noise as large as the little that is meant, and nothing was learned.
ADAMW_NAMES = ("embed", "norm", "modulation", "adaln", "table", "head", "patch", "text_attention")
# Keys under which a model keeps blocks stacked on a leading axis: `{"blocks": {"mlp": {"kernel": [layers, in, out]}}}`.
STACK_NAMES = ("blocks", "layers")


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """How a stage's parameters are updated.

    Attributes:
      learning_rate: peak learning rate, the same for Muon and AdamW.
      warmup_steps: updates over which the rate rises linearly from 0.
      decay: `cosine` falls from the peak to `final_fraction` over the whole run; `linear` holds the peak and falls
        over the last 20% of the updates (warm-up, stable, decay: the run can be extended before the fall).
      final_fraction: rate at the last update, as a fraction of the peak.
      weight_decay: decoupled; on Muon's matrices, or without Muon on every `kernel`.
      clip_norm: the gradient's global norm is clipped to this.
      betas: AdamW's decay rates of the first and second moments, in Muon's company too; distribution matching wants (0, 0.999).
      muon: False puts every parameter on AdamW (few-step distillation and heads).
    """

    learning_rate: float
    warmup_steps: int = 100
    decay: Literal["cosine", "linear"] = "cosine"
    final_fraction: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    muon: bool = True

    def __post_init__(self):
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        if self.decay not in ("cosine", "linear"):
            raise ValueError(f"decay must be 'cosine' or 'linear', got {self.decay!r}")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction must lie in 0 to 1, got {self.final_fraction}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers, each at least 0 and below 1, got {self.betas}")


def learning_rate_schedule(config: OptimiserConfig, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the update's number: linear warm-up, then the configured decay.

    Raises:
      ValueError: `total_steps` leaves no update after the warm-up.
    """
    if total_steps <= config.warmup_steps:
        raise ValueError(
            f"total_steps={total_steps} must exceed warmup_steps={config.warmup_steps}: "
            "train longer or shorten the warm-up"
        )
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    if config.decay == "cosine":
        decay = optax.cosine_decay_schedule(peak, total_steps - config.warmup_steps, alpha=config.final_fraction)
        return optax.join_schedules([warmup, decay], [config.warmup_steps])
    start = max(config.warmup_steps, int(0.8 * total_steps))
    fall = optax.linear_schedule(peak, final, total_steps - start)
    return optax.join_schedules([warmup, optax.constant_schedule(peak), fall], [config.warmup_steps, start])


def make_optimiser(params: PyTree[Array], config: OptimiserConfig, total_steps: int) -> optax.GradientTransformation:
    """Global-norm clip, then Muon on the hidden matrices of `params` and AdamW on everything else.

    The state keeps the norms of the last gradient (`GradientNorms`), from before the clip.

    Args:
      params: nested dict of arrays (`nnx.to_pure_dict`), read for its structure and shapes only.
      config: rates and limits.
      total_steps: updates of the whole stage, for the schedule.

    Raises:
      ValueError: `config.muon` is set and no parameter is a hidden matrix by `muon_dimensions` (a model that names its
        weights otherwise would train on AdamW unnoticed).
    """
    rate = learning_rate_schedule(config, total_steps)
    first, second = config.betas
    if config.muon:
        dimensions = muon_dimensions(params)
        if not any(jax.tree.leaves(dimensions, is_leaf=_is_leaf)):
            raise ValueError(
                "muon=True, but no parameter is a hidden `kernel`: set muon=False, or name weights `kernel`"
            )
        update = _in_stacks(
            optax.contrib.muon(
                rate,
                muon_weight_dimension_numbers=_stack_dimensions,
                consistent_rms=0.2,
                weight_decay=config.weight_decay,
                adam_b1=first,
                adam_b2=second,
                adam_learning_rate=rate,
            )
        )
    else:
        update = optax.adamw(rate, b1=first, b2=second, weight_decay=config.weight_decay, mask=_matrices)
    return optax.chain(_keep_norms(), optax.clip_by_global_norm(config.clip_norm), update)


class GradientNorms(NamedTuple):
    """The norm of the last gradient in every top-level group of the parameters, as part of an optimiser's state.

    Kept there because a gradient is seen nowhere else: so every stage's log has its norms, and no stage has to pass them on.
    """

    groups: dict[str, Float[Array, ""]]


def _keep_norms() -> optax.GradientTransformation:
    """Passes the gradient on as it is."""

    def init(params):
        return GradientNorms({str(name): jnp.zeros(()) for name in params})

    def update(updates, state, params=None):
        del state, params
        return updates, GradientNorms({str(name): _norm(group) for name, group in updates.items()})

    return optax.GradientTransformation(init, update)


def _norm(tree: PyTree[Array]) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def gradient_norms(state: PyTree[Array]) -> dict[str, Float[Array, ""]]:
    """{"gradient_norm/GROUP": norm} of the optimiser states anywhere in `state`.

    Of a whole `TrainState` the optimiser's groups are named plainly; those of another optimiser in its `extra` (a critic's) carry its key before them.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, GradientNorms))
    norms = {}
    for path, leaf in leaves:
        if isinstance(leaf, GradientNorms):
            keys = [str(getattr(entry, "key", getattr(entry, "name", None))) for entry in path if not hasattr(entry, "idx")]
            keys = [key for key in keys if key not in ("opt_state", "extra")]
            norms |= {"/".join(["gradient_norm", *keys, name]): norm for name, norm in leaf.groups.items()}
    return norms


def muon_dimensions(params: PyTree[Array]) -> PyTree:
    """Which axes of each parameter Muon orthogonalises; None where AdamW applies.

    A hidden matrix is a leaf named `kernel`, of shape [in, out] or, in a stack of blocks, [layers, in, out], whose path
    holds none of `ADAMW_NAMES`. Convolution kernels go to AdamW.

    Returns:
      The tree of `params` with `optax.contrib.MuonDimensionNumbers` or None at the leaves.
    """

    def choose(path, leaf):
        keys = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
        hidden = keys[-1] == "kernel" and not any(word in str(key).lower() for key in keys for word in ADAMW_NAMES)
        if hidden and leaf.ndim - _stacked(keys) == 2:
            return optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return None

    return jax.tree_util.tree_map_with_path(choose, params)


def _in_stacks(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` over hidden matrices stacked by shape, every stack split over the devices.

    Orthogonalising is a fifth to two fifths of an update's time at this project's sizes, and would be done in full on every device.
    Stacks divide over the devices where single matrices don't, and are fewer, larger products. Zeros fill them up to a multiple of the
    devices within an update only, so that a checkpoint does not depend on how many there were.
    """

    def init(params):
        return inner.init(_stack(params))

    def update(updates, state, params=None):
        stacked, filled = inner.update(
            _split(_stack(updates)), _split(state), None if params is None else _split(_stack(params))
        )
        state = jax.tree.map(lambda new, old: new[tuple(slice(size) for size in old.shape)], filled, state)
        return _unstack(stacked, updates), state

    return optax.GradientTransformation(init, update)


def _groups(tree: PyTree[Array]) -> dict[str, list[int]]:
    """Numbers of the hidden matrices among the tree's leaves, by the shape of a matrix."""
    groups: dict[str, list[int]] = {}
    dimensions = jax.tree.leaves(muon_dimensions(tree), is_leaf=_is_leaf)
    for index, (leaf, dims) in enumerate(zip(jax.tree.leaves(tree), dimensions, strict=True)):
        if dims is not None:
            groups.setdefault("{}x{}".format(*leaf.shape[-2:]), []).append(index)
    return groups


def _stack(tree: PyTree[Array]) -> dict[str, dict[Any, Array]]:
    """{"hidden": {shape: [matrices, in, out]}, "other": {number of the leaf: leaf}}"""
    leaves, groups = jax.tree.leaves(tree), _groups(tree)
    hidden = {}
    for shape, members in groups.items():
        hidden[shape] = jnp.concatenate([leaves[index].reshape(-1, *leaves[index].shape[-2:]) for index in members])
    taken = {index for members in groups.values() for index in members}
    return {"hidden": hidden, "other": {index: leaf for index, leaf in enumerate(leaves) if index not in taken}}


def _split(tree: PyTree[Array]) -> PyTree[Array]:
    """Every stack of hidden matrices in the tree filled up to a multiple of the devices and split over them."""

    def split(path, leaf):
        if not any(getattr(entry, "key", None) == "hidden" for entry in path):
            return leaf
        return split_stack(leaf)

    return jax.tree_util.tree_map_with_path(split, tree)


def _unstack(stacked: dict[str, dict[Any, Array]], like: PyTree[Array]) -> PyTree[Array]:
    """The inverse of `_stack` for a tree of the structure and shapes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    result = dict(stacked["other"])
    for shape, members in _groups(like).items():
        first = 0
        for index in members:
            count = leaves[index].size // math.prod(leaves[index].shape[-2:])
            result[index] = stacked["hidden"][shape][first : first + count].reshape(leaves[index].shape)
            first += count
    return jax.tree.unflatten(structure, [result[index] for index in range(len(leaves))])


def _stack_dimensions(stacked: dict[str, dict[Any, Array]]) -> PyTree:
    matrices = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return {
        "hidden": dict.fromkeys(stacked["hidden"], matrices),
        "other": dict.fromkeys(stacked["other"]),
    }


def ema_update(ema: PyTree[Array], params: PyTree[Array], step: Array, decay: float) -> PyTree[Array]:
    """Exponential moving average of the parameters, quicker at first: decay min(decay, (1 + step) / (10 + step)).

    Without the ramp an average over 1 / (1 - decay) updates would remember the random initial values for as long.
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda mean, new: mean + (1.0 - decay) * (new - mean), ema, params)


def _is_leaf(node: Any) -> bool:
    return node is None or isinstance(node, optax.contrib.MuonDimensionNumbers)


def _stacked(keys: list[str | int]) -> bool:
    """True when a stack name on the path is not followed by a block's number: the blocks share one leading axis."""
    return any(
        key in STACK_NAMES and not str(following).isdecimal() for key, following in zip(keys, keys[1:], strict=False)
    )


def _matrices(params: PyTree[Array]) -> PyTree[bool]:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: getattr(path[-1], "key", None) == "kernel", params)
