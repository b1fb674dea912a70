"""Runs an update again that stopped a run because something was not finite, and tells what went wrong first.

`python train.py STAGE ... --replay`, the rest of the command as it was.
"""

import dataclasses
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from pikastream_jax.training.checkpoint import CHECKPOINTS, Checkpoints
from pikastream_jax.training.failure import kept_batch, last_failure
from pikastream_jax.training.loop import Stage, check_same_run, not_finite, step_function


@dataclasses.dataclass(frozen=True)
class Replay:
    """What the first bad update did.

    Attributes:
      step: number of updates with it.
      metrics: those that are not finite, the stage's own and then the norms of gradients.
      leaves: tree paths in the state after it that are not finite.
      where: the operation that made the first NaN when the update ran one operation after another, with its line; None if none did
        (the trouble was an infinity).
    """

    step: int
    metrics: dict[str, float]
    leaves: list[str]
    where: str | None

    def __str__(self) -> str:
        metrics = ", ".join(f"{name} {value}" for name, value in self.metrics.items()) or "all are finite"
        shown = ", ".join(self.leaves[:8]) + (f" and {len(self.leaves) - 8} more" if len(self.leaves) > 8 else "")
        return "\n".join(
            [
                f"step {self.step} is the first that is not finite",
                f"  metrics: {metrics}",
                f"  state after it: {shown or 'all is finite'}",
                f"  first NaN, one operation after another: {self.where or 'none: it is an infinity, or it needs the compiled program'}",
            ]
        )


def replay(stage: Stage, out_dir: str | Path) -> Replay:
    """Repeats the updates from the last good checkpoint to the failed one of the run in `out_dir`; writes nothing.

    The failed update takes the batch that was kept; the others take theirs from the stage as they did.

    Raises:
      FileNotFoundError: no failure was kept.
      ValueError: the folder holds another run, or all updates are finite this time.
    """
    out_dir = Path(out_dir)
    failure = last_failure(out_dir)
    check_same_run(stage, failure, out_dir)
    state = _state_before(stage, out_dir, failure["checkpoint"])
    data, batches = stage.data(), stage.batches() if stage.batches else None
    update = step_function(stage)
    compiled = jax.jit(update)
    for step in range(int(state.step) + 1, failure["step"] + 1):
        batch = {} if batches is None else batches[step - 1]
        if step == failure["step"]:
            batch = kept_batch(failure["folder"], batch)
        new, metrics = compiled(state, data, batch)
        metrics = not_finite({name: float(value) for name, value in metrics.items()})
        leaves = _not_finite(new)
        if metrics or leaves:
            return Replay(step, metrics, leaves, _first_nan(compiled, state, data, batch))
        state = new
    raise ValueError(
        f"all updates up to {failure['step']} are finite this time, then {failure['what']}: "
        "another machine, another version or other data than in the run"
    )


def _state_before(stage: Stage, out_dir: Path, checkpoint: int | None) -> PyTree[Array]:
    if checkpoint is None:
        return stage.init()
    checkpoints = Checkpoints(out_dir / CHECKPOINTS, write=False)
    try:
        return jax.tree.map(jnp.asarray, checkpoints.restore(checkpoint, jax.eval_shape(stage.init)))
    finally:
        checkpoints.close()


def _not_finite(state: PyTree[Array]) -> list[str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.isfinite(leaf).all()
    ]


def _first_nan(update, *arguments: PyTree[Array]) -> str | None:
    """JAX's own search: with `jax_debug_nans` a program whose result has a NaN runs again, one operation after another."""
    try:
        with jax.debug_nans(True):
            jax.block_until_ready(update(*arguments))
    except FloatingPointError as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename != __file__]
        line = f", {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""
        return str(error).splitlines()[0] + line
    return None
