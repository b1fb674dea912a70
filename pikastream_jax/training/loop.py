"""The loop that every stage runs in: updates, metrics, pictures, checkpoints, and leaving cleanly.

A stage hands over pure functions; the loop owns everything that has to do with time and files. A run is a function of
the stage and its seed alone: the update of step n gets `fold_in(key(seed), n)` and takes its data by that
key, or as element n of its data set. So the position in the data and the random state are the step number, and a run stopped anywhere continues bit for bit.
"""

import contextlib
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree
from tqdm import tqdm

from pikastream_jax.training.board import open_board
from pikastream_jax.training.checkpoint import CHECKPOINTS, Checkpoints
from pikastream_jax.training.failure import keep_failure
from pikastream_jax.training.mesh import data_shardings, make_mesh, placed, put, put_batch, replicated
from pikastream_jax.training.metrics import METRICS_FILE, MetricsFile, convergence_verdict
from pikastream_jax.training.only_writer import only_writer
from pikastream_jax.training.optimiser import ema_update, gradient_norms
from pikastream_jax.training.prefetch import Prefetch
from pikastream_jax.training.processes import any_process, gather, is_first, on_one_device, on_the_host, passing_folder
from pikastream_jax.training.signals import StopRequest, stop_on_signal
from pikastream_jax.training.speed import speed_figures, update_operations
from pikastream_jax.training.whole_file import write_whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes; leaves are plain arrays (a PRNG key goes in as `jax.random.key_data`)."""

    step: Int[Array, ""]  # updates done
    params: PyTree[Array]  # nested dict, `nnx.to_pure_dict`
    opt_state: PyTree[Array]
    ema: PyTree[Array]  # like params
    extra: PyTree[Array]  # the stage's own; {} where it has none

    @classmethod
    def start(cls, params: PyTree[Array], optimiser: optax.GradientTransformation) -> "TrainState":
        """The state before the first update, its average at the parameters."""
        return cls(jnp.zeros((), jnp.int32), params, optimiser.init(params), params, {})

    def descend(
        self, gradient: PyTree[Array], optimiser: optax.GradientTransformation, ema_decay: float
    ) -> "TrainState":
        """Parameters, optimiser state and average after `gradient`; the loop counts `step`."""
        updates, opt_state = optimiser.update(gradient, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        ema = ema_update(self.ema, params, self.step, ema_decay)
        return dataclasses.replace(self, params=params, opt_state=opt_state, ema=ema)


Metrics = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
      name: the stage's name, as given to `train.py`.
      total_steps: updates of the whole stage, over all stretches.
      seed: everything random follows from it.
      init: builds the state before the first update; traced, not run, when a checkpoint takes its place.
      update: (state, key of this step, data, batch) -> (state, scalars with `loss` among them), traced once under jit with the
        state donated. The loop counts `step` itself.
      data: loads the arrays that every update reads, frozen models among them, once at the start; an empty dict where data is made on the fly.
      batches: gives a `grain.MapDataset` whose element n is the batch (a pytree of NumPy arrays) of update n, so that the position in
        the data is the number of updates done; None where `data` is all there is, and `batch` then {}.
      config: JSON-able record of what is trained, and from what; a run is only continued with the same one.
      evaluate: (state, data) -> scalars on held-out data, `loss` among them; a function of these alone.
      evaluate_every: in updates; also done after the last one.
      sample: (state, data, path) -> None, draws a picture of what the model does now, a PNG at that path.
      sample_every: in updates; also done after the last one.
      frames: video frames that an update trains on, for the speed in the log; None where it is not about video.
    """

    name: str
    total_steps: int
    seed: int
    init: Callable[[], TrainState]
    update: Callable[[TrainState, Key[Array, ""], PyTree[Array], PyTree[Array]], tuple[TrainState, Metrics]]
    data: Callable[[], PyTree[Array]] = dict
    batches: Callable[[], Sequence[PyTree[Array]]] | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluate: Callable[[TrainState, PyTree[Array]], Metrics | dict[str, float]] | None = None
    evaluate_every: int = 500
    sample: Callable[[TrainState, PyTree[Array], Path], None] | None = None
    sample_every: int = 500
    frames: int | None = None

    def __post_init__(self):
        for name in ("total_steps", "evaluate_every", "sample_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"stage {self.name}: {name} must be at least 1, got {getattr(self, name)}")


class NonFiniteError(RuntimeError):
    """A metric or a parameter became NaN or infinite. The message names the step and the last good checkpoint.

    `replay.replay` finds out more from the folder `nan_step_*` that is left.
    """


def not_finite(metrics: dict[str, float]) -> dict[str, float]:
    """Those that are NaN or infinite, the stage's own before the norms of gradients that follow from them."""
    names = sorted(metrics, key=lambda name: name.startswith("gradient_norm/"))
    return {name: metrics[name] for name in names if not math.isfinite(metrics[name])}


def step_function(stage: Stage) -> Callable[[TrainState, PyTree[Array], PyTree[Array]], tuple[TrainState, Metrics]]:
    """One update of `stage` with its key and its count: (state, data, batch) -> (state, metrics), norms of gradients among them."""

    def update(state: TrainState, data: PyTree[Array], batch: PyTree[Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(stage.seed), state.step)
        new, metrics = stage.update(state, key, data, batch)
        return dataclasses.replace(new, step=state.step + 1), metrics | gradient_norms(new)

    return update


def run(
    stage: Stage,
    out_dir: str | Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    save_every_minutes: float = 5.0,
    log_every: int = 10,
    keep: int = 2,
    mesh: Mesh | None = None,
) -> TrainState:
    """Trains `stage` in `out_dir` until it is complete, its time is up, or the process is asked to stop; then saves.

    The folder gets `metrics.jsonl`, `samples/step_00000500.png`, `checkpoints/` (the last few), `config.json`, and `tensorboard/` where
    tensorboardX is installed. Training goes on while a checkpoint is written; on leaving, the last one is waited for.

    Args:
      stage: what to train.
      out_dir: the run's folder, made if missing.
      minutes: stop after about this long, compilation included; the run can be resumed.
      steps: stop after this many updates in this stretch; the run can be resumed.
      save_every_minutes: time between checkpoints. One is always written on leaving.
      log_every: updates averaged into a row of metrics. Nothing waits for the device in between.
      keep: checkpoints that stay, the newest.
      mesh: the devices; by default all of them in the axis `data`. A run can go on on another mesh, and in another number of processes.

    Returns:
      The state after the last update of this stretch.

    Raises:
      ValueError: the folder holds another stage, seed or configuration, another process trains in it, or the mesh divides neither model nor batch.
      NonFiniteError: see there. The folder's checkpoints are all finite.
      OSError: the folder cannot be written, or the disk is full. What was saved before is whole.
    """
    for name, value in {"minutes": minutes, "steps": steps, "log_every": log_every}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    # Of several processes that train together the first one writes.
    with only_writer(out_dir) if is_first() else contextlib.nullcontext(), stop_on_signal() as stop_request:
        stretch = _Stretch(stage, Path(out_dir), log_every, keep, make_mesh() if mesh is None else mesh)
        try:
            with jax.set_mesh(stretch.mesh):
                return stretch.train(stop_request, minutes, steps, save_every_minutes)
        finally:
            stretch.close()


def rehearse(stage: Stage, out_dir: str | Path, *, mesh: Mesh | None = None) -> None:
    """One update, one evaluation and one picture of a run that begins, without a checkpoint: then all its programs are compiled.

    What comes out is not looked at: a rehearsal may start from anything.

    Args:
      out_dir: for the pictures and what else a run writes; not the run's own folder.

    Raises:
      ValueError: a run lies there, or another process writes there.
    """
    if any((Path(out_dir) / CHECKPOINTS).glob("*")):
        raise ValueError(f"{out_dir} holds a run, which a rehearsal would write into: give it another folder with --out")
    with only_writer(out_dir) if is_first() else contextlib.nullcontext():
        stretch = _Stretch(stage, Path(out_dir), 1, 1, make_mesh() if mesh is None else mesh)
        try:
            with jax.set_mesh(stretch.mesh):
                stretch.rehearse()
        finally:
            stretch.close()


class _Stretch:
    """One process's share of a run: the state between updates, and the open files."""

    def __init__(self, stage: Stage, out_dir: Path, log_every: int, keep: int, mesh: Mesh):
        self.started = time.monotonic()
        self.mesh = mesh
        out_dir.mkdir(parents=True, exist_ok=True)
        self.stage, self.log_every = stage, log_every
        self.out_dir = out_dir if is_first() else passing_folder()  # but for the checkpoints, files are written once
        self.checkpoints = Checkpoints(out_dir / CHECKPOINTS, keep)
        self.saved_step = self.checkpoints.latest_step
        self.pending: list[dict[str, Any]] = []  # metrics of the updates since the last row, on the device at first
        self.seconds_before = 0.0  # training time of earlier stretches
        abstract = placed(mesh, jax.eval_shape(stage.init))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        if self.saved_step is None:
            with on_the_host():
                self.state: TrainState = put(stage.init(), shardings)
        else:
            record = self.checkpoints.record(self.saved_step)
            check_same_run(stage, record, out_dir)
            self.state = self.checkpoints.restore(self.saved_step, abstract)
            self.pending, self.seconds_before = record["pending"], record["seconds"]
        self.step = int(self.state.step)
        self.metrics = MetricsFile(self.out_dir / METRICS_FILE, self.step)
        write_whole(self.out_dir / "config.json", json.dumps(_record(stage), indent=2) + "\n")

        self.board = open_board(self.out_dir / "tensorboard", self.step)
        data = stage.data()
        self.data = put(data, data_shardings(mesh, data))
        self.batches = Prefetch(stage.batches(), self.step, stage.total_steps) if stage.batches else None
        # The state comes back as it went in, however an update splits it.
        self.update = jax.jit(step_function(stage), donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        self.operations: int | None = None  # of an update; known once it is traced

    def train(
        self, stop_request: StopRequest, minutes: float | None, steps: int | None, save_every_minutes: float
    ) -> TrainState:
        stage = self.stage
        last = stage.total_steps if steps is None else min(stage.total_steps, self.step + steps)
        deadline = math.inf if minutes is None else self.started + 60 * minutes
        next_save = time.monotonic() + 60 * save_every_minutes
        first = self.step
        with tqdm(
            total=stage.total_steps,
            initial=self.step,
            desc=stage.name,
            unit="update",
            dynamic_ncols=True,
            disable=not is_first(),
            mininterval=0.5 if sys.stderr.isatty() else 30.0,  # a log file wants a line now and then
        ) as bar:
            while self.step < last and not self._agreed(stop_request or time.monotonic() >= deadline):
                batch = put_batch(self.batches.take(), self.mesh) if self.batches else {}
                if self.step == first:
                    self.operations = update_operations(self.update.trace(self.state, self.data, batch))
                self.state, metrics = self.update(self.state, self.data, batch)
                self.step += 1
                if self.step == first + 1:  # the speed is that of updates, not of compiling them
                    jax.block_until_ready(self.state)
                    self.logged_step, self.logged_at = self.step, time.monotonic()
                self.pending.append(metrics)
                if self._due(self.log_every):
                    self._log(bar)
                evaluate = stage.evaluate and self._due(stage.evaluate_every)
                sample = stage.sample and self._due(stage.sample_every)
                save = self._agreed(time.monotonic() > next_save)
                if evaluate or sample or save:
                    jax.block_until_ready(self.state)  # updates under way are no part of the pause
                    paused_at = time.monotonic()
                    if evaluate:
                        self._evaluate(bar)
                    if sample:
                        self._sample()
                    if save:
                        self._save()
                        next_save = time.monotonic() + 60 * save_every_minutes
                    self.logged_at += time.monotonic() - paused_at
        if self.step > first and self.step != self.saved_step:
            self._save()
        self.checkpoints.wait()
        self._report(stop_request)
        return self.state

    def rehearse(self) -> None:
        batch = put_batch(self.batches.take(), self.mesh) if self.batches else {}
        self.state, _ = self.update(self.state, self.data, batch)
        if self.stage.evaluate:
            jax.block_until_ready(self.stage.evaluate(self.state, self.data))
        if self.stage.sample:
            self._sample()
        jax.block_until_ready(_finite_leaves(self.state))

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # each is closed though another's last bytes found the disk full
            for resource in (self.checkpoints, self.metrics, self.board, self.batches):
                if resource:
                    stack.callback(resource.close)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.stage.total_steps

    def _agreed(self, wish: bool | StopRequest) -> bool:
        """Whether to do now what any process wishes, each going by its own clock and signals; several processes only ask where they stop to log anyway."""
        if jax.process_count() > 1 and self.step % self.log_every:
            return False
        return any_process(bool(wish))

    def _sample(self) -> None:
        state, data = gather((self.state, self.data))
        if is_first():  # a picture is drawn by code that knows of no other process
            samples = self.out_dir / "samples"
            samples.mkdir(exist_ok=True)
            with on_one_device():
                picture = samples / f"step_{self.step:08d}.png"
                self.stage.sample(state, data, picture)
                if self.board:
                    self.board.picture(self.step, "samples", picture)

    def _fetch(self) -> None:
        """Brings the pending metrics to the host, which waits for the updates, and checks them."""
        self.pending = [{name: float(value) for name, value in row.items()} for row in jax.device_get(self.pending)]
        for offset, row in enumerate(self.pending):
            if bad := not_finite(row):
                what = ", ".join(f"{name} is {value}" for name, value in bad.items())
                self._fail(self.step - len(self.pending) + 1 + offset, what)

    def _fail(self, step: int, what: str) -> None:
        """Leaves in the folder what shows why, and raises."""
        with contextlib.suppress(OSError):  # of a save under way; what went wrong first is said
            self.checkpoints.wait()
        saved = self.checkpoints.latest_step
        good = (
            "no checkpoint was written yet"
            if saved is None
            else f"the last good checkpoint is {self.checkpoints.path(saved)} (step {saved})"
        )
        try:
            batch = self.stage.batches()[step - 1] if self.stage.batches else {}
            folder = keep_failure(self.out_dir, step, _record(self.stage) | {"what": what, "checkpoint": saved}, batch)
            kept = f"kept for replay in {folder}: the same command with --replay tells what went wrong first"
        except OSError as error:
            kept = f"the batch could not be kept ({error})"
        raise NonFiniteError(
            f"{self.stage.name}: at step {step} {what}; {good}; {kept}. "
            "Lower the learning rate or change the seed, and start anew."
        )

    def _log(self, bar: tqdm) -> None:
        self._fetch()
        means = {name: float(np.mean([row[name] for row in self.pending])) for name in self.pending[0]}
        now = time.monotonic()
        timed = self.step - self.logged_step  # none where the stretch's first update ends a row
        speeds = speed_figures(timed / max(now - self.logged_at, 1e-9), self.stage.frames, self.operations) if timed else {}
        self.metrics.append(self.step, "train", means, **speeds, seconds=round(self._seconds(), 1))
        if self.board:
            self.board.scalars(self.step, "train", means)
            self.board.scalars(self.step, "speed", speeds)
        self.checkpoints.check()  # a full disk is said now, not when the next checkpoint is due
        bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
        bar.update(self.step - bar.n)
        self.pending, self.logged_step, self.logged_at = [], self.step, now

    def _evaluate(self, bar: tqdm) -> None:
        values = {name: float(value) for name, value in self.stage.evaluate(self.state, self.data).items()}
        for name, value in values.items():
            if not math.isfinite(value):
                self._fail(self.step, f"held-out {name} is {value}")
        self.metrics.append(self.step, "held_out", values)
        if self.board:
            self.board.scalars(self.step, "held_out", values)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if is_first():
            bar.write(f"step {self.step}: held-out {figures}", file=sys.stderr)

    def _save(self) -> None:
        self._fetch()
        # A finite loss does not vouch for the parameters that its gradient made.
        if not all(bool(finite) for finite in jax.device_get(_finite_leaves(self.state))):
            self._fail(self.step, "a parameter or optimiser state is not finite")
        self.metrics.sync()
        record = _record(self.stage) | {"pending": list(self.pending), "seconds": self._seconds()}  # written later, while `pending` grows
        self.checkpoints.save(self.step, self.state, record)
        self.saved_step = self.step

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _report(self, stop_request: StopRequest) -> None:
        def say(line: str) -> None:
            if is_first():
                print(f"{self.stage.name}: {line}", file=sys.stderr, flush=True)

        where = "nothing new to save" if self.saved_step is None else f"saved {self.checkpoints.path(self.saved_step)}"
        if self.step >= self.stage.total_steps:
            say(f"complete after {self.step} updates, {where}")
            if self.stage.evaluate:
                say(convergence_verdict(self.out_dir / METRICS_FILE))
        else:
            reason = f"stopped by {stop_request.name}" if stop_request else "end of this stretch"
            command = shlex.join([Path(sys.executable).name, *sys.argv])
            say(f"{reason} at step {self.step} of {self.stage.total_steps}, {where}; resume with: {command}")


@jax.jit
def _finite_leaves(state: PyTree[Array]) -> list[Array]:
    return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _record(stage: Stage) -> dict[str, Any]:
    return {"stage": stage.name, "seed": stage.seed, "total_steps": stage.total_steps, "config": stage.config}


def check_same_run(stage: Stage, record: dict[str, Any], out_dir: Path) -> None:
    """Raises ValueError unless the checkpoint's stage, seed and configuration are those of `stage`.

    The length may change: that is how an under-trained stage is given more updates.
    """
    now = json.loads(json.dumps(_record(stage)))  # tuples come back as lists
    now, before = ({name: value for part in ("stage", "seed", "config") for name, value in _flat(part, of[part])} for of in (now, record))
    differences = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in sorted(now.keys() | before.keys()) if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(f"{out_dir} holds another run ({'; '.join(differences)}): use its settings, or another folder")


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A JSON value's leaves, each with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value
