"""The whole recipe, stage after stage: `python train.py recipe --config nano`.

Every step is a command of its own, in a process of its own, which leaves its result in a folder of `runs/CONFIG` and finds there what it
starts from. The recipe can be stopped anywhere and goes on with the same command: steps that are complete are passed over, and a stage that
was cut short continues at its last checkpoint.

On a fast device a stage of the small presets takes a minute, and its process as long again to start, trace and compile. So `--jobs 4` runs up to
four steps at once, each as soon as all it may start from is there, and `--rehearse` does every step once in small beforehand, in a process that then
ends (`rehearsal`), by which its programs come into JAX's compilation cache. The step itself finds a process that waits, with everything imported.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from configs import left_out, preset
from pikastream_jax.training.only_writer import only_writer
from pikastream_jax.training.rehearsal import Rehearsals
from pikastream_jax.training.signals import stop_on_signal
from pikastream_jax.training.steps import RECIPE, Step
from pikastream_jax.training.whole_file import write_whole
from pikastream_jax.training.worker import COMPILED, Worker

_RECORD = "recipe.json"  # within the folder of all runs: preset, seed, and minutes of every step
_POLL = 0.05  # seconds
_SOON, _LATER = 20.0, 60.0  # seconds that must be left for a step to begin: for a stage whose programs are compiled, for any other

# For programs that run for less time than it takes to tune them. XLA compiles every fusion with a sum or a transposition in it (half of an update's)
# a second time by way of Triton, and every matrix product in many tilings, and keeps what is fastest on the card. Left to XLA's own kernels
# and cuBLAS, nothing is compiled that is not used. Random numbers come from JAX's kernel, the same ones, instead of 140 operations each time.
_COMPILED_SOON = {
    "XLA_FLAGS": "--xla_gpu_experimental_enable_fusion_autotuner=false --xla_gpu_enable_triton_gemm=false",
    "JAX_THREEFRY_GPU_KERNEL_LOWERING": "true",
}
_NICE = 10  # of rehearsals: a step that runs compiles before those that are still to come


class Process(Protocol):
    """What the recipe needs of a `Worker`."""

    def run(self, command: list[str]) -> None:
        """Starts a command."""

    def status(self) -> int | None:
        """Exit status of the last command; None while it runs."""

    def stop(self) -> None:
        """Asks the command to save and leave."""

    def close(self) -> None:
        """Ends the process."""


def run_recipe(
    config: str,
    runs: Path,
    seed: int,
    minutes: float | None,
    *,
    jobs: int = 1,
    rehearse: bool = False,
    steps: Sequence[Step] = RECIPE,
    worker: Callable[[int], Process] = Worker,
) -> None:
    """Runs the steps that are not complete, each once all is complete that comes before it and that it may start from.

    Args:
      minutes: stop after about this long; the same command goes on. In the last minute only stages begin that have rehearsed, and a step that is
        no stage is not cut short.
      jobs: steps at a time, the first of the recipe first.
      rehearse: rehearse the steps whose turn is yet to come, and keep as many processes waiting as may run at once.
      worker: starts a process of that niceness, which runs commands.

    Raises:
      ValueError: no such preset, no job at a time, another process runs a recipe there, the folder holds one of another preset or seed, or a step failed; the steps beside it are asked to save and leave.
    """
    preset(config)
    if jobs < 1:
        raise ValueError(f"--jobs {jobs} must be at least 1: so many steps run at once")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))  # stages find it themselves, other commands do not
    if jobs > 1 or rehearse:
        # Several processes share the device's memory: none may take most of it beforehand.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        for name, value in _COMPILED_SOON.items():
            os.environ.setdefault(name, value)
    if rehearse:
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # of small programs there are many
    steps = [step for step in steps if step.run not in left_out(config)]
    with only_writer(runs), stop_on_signal() as asked:
        course = _Course(config, runs, seed, minutes, steps, worker)
        try:
            if rehearse:
                course.rehearsals = Rehearsals(config, runs, seed)
            while course.go_on(jobs, stopped=bool(asked)):
                time.sleep(_POLL)
        finally:
            course.close()
            course.report()


def _begun(file: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The record of a recipe that begins, which is put in its place, or goes on.

    Raises:
      ValueError: the one that is there cannot be read, or was begun with something else.
    """
    if not file.is_file():
        record = now | {"minutes": {}}
        write_whole(file, json.dumps(record, indent=2) + "\n")
        return record
    try:
        record = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}): remove it, the runs beside it stay as they are") from error
    for name, value in now.items():
        if record.get(name) != value:
            raise ValueError(f"{file.parent} holds a recipe with --{name} {record.get(name)}, not {value}: give that, or another folder with --runs")
    return record


class _Course:
    """Who runs what at the moment."""

    def __init__(self, config: str, runs: Path, seed: int, minutes: float | None, steps: Sequence[Step], worker: Callable[[int], Process]):
        self.config, self.runs, self.seed, self.steps, self.worker = config, runs, seed, steps, worker
        self.record = _begun(runs / _RECORD, {"config": config, "seed": seed})
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.left = [step for step in steps if not step.complete(config, runs)]
        self.running: dict[str, tuple[Step, Process, float]] = {}
        self.waiting: list[Process] = []  # for the next steps
        self.rehearsals: Rehearsals | None = None
        self.rehearsing: dict[str, Process] = {}
        self.begun: set[str] = set()  # rehearsals
        self.rehearsed: set[str] = set()
        self.spent: dict[str, float] = {}
        self.cut_short = False  # nothing new begins
        self.stopped = False

    def go_on(self, jobs: int, stopped: bool) -> bool:
        """Takes note of what has ended and starts what can be started; whether anything runs.

        Args:
          stopped: by a signal. A command that could not save yet may end by it, which is no failure.

        Raises:
          ValueError: a step failed.
        """
        for run, (step, process, began) in list(self.running.items()):
            status = process.status()
            if status is None:
                continue
            del self.running[run]
            process.close()
            self.spent[run] = round((time.monotonic() - began) / 60, 2)
            if status and not (stopped and status == -signal.SIGTERM):
                raise ValueError(f"the recipe stopped at {run} (exit status {status}); the same command goes on from there")
            if not step.complete(self.config, self.runs):
                self.cut_short = True
        if stopped and not self.stopped:
            self.stopped = self.cut_short = True
            for _, process, _ in self.running.values():
                process.stop()
        while len(self.running) < jobs and not self.cut_short and (step := self._next()):
            self._start(step)
        if self.running and not self.cut_short and self.rehearsals is not None:
            self._rehearse_some(self.rehearsals)
            self.waiting += [self.worker(0) for _ in range(min(jobs, len(self.left)) - len(self.waiting))]
        return bool(self.running)

    def _next(self) -> Step | None:
        """The first step that can be started."""
        not_there = {step.run for step in self.left} | set(self.running)
        for number, step in enumerate(self.left):
            before = {other.run for other in self.steps[: self.steps.index(step)]}
            if not step.starts_from & before & not_there and self._in_time(step):
                return self.left.pop(number)
        return None

    def _in_time(self, step: Step) -> bool:
        """Whether something would come of the step before the deadline: a stage saves after any update, once its program is there."""
        soon = step.is_stage and step.run in self.rehearsed
        return self.deadline is None or self.deadline - time.monotonic() > (_SOON if soon else _LATER)

    def _start(self, step: Step) -> None:
        print(f"recipe: step {self.steps.index(step) + 1} of {len(self.steps)}, {step.run}", file=sys.stderr, flush=True)
        process = self.waiting.pop(0) if self.waiting else self.worker(0)
        command = step.command(self.config, self.runs, self.seed)
        if step.is_stage and self.deadline is not None:
            command += ["--minutes", f"{(self.deadline - time.monotonic()) / 60:.2f}"]
        process.run(command)
        self.running[step.run] = step, process, time.monotonic()

    def _rehearse_some(self, rehearsals: Rehearsals) -> None:
        """As many rehearsals at a time as half the cores: a compilation takes more than one.

        One whose step's turn has come goes on: what it makes is read by others, and an entry of the cache that is cut off in the middle would be
        of no use to anybody.
        """
        for run in [run for run, process in self.rehearsing.items() if process.status() is not None]:
            process = self.rehearsing.pop(run)
            if process.status() == 0:
                self.rehearsed.add(run)
            process.close()  # it would keep the device's memory
        for step in self.left:
            if len(self.rehearsing) >= max(1, (os.cpu_count() or 1) // 2):
                return
            if step.run not in self.begun and rehearsals.possible(step):
                self.begun.add(step.run)
                self.rehearsing[step.run] = self.worker(_NICE)
                self.rehearsing[step.run].run(rehearsals.command(step))

    def close(self) -> None:
        """Ends all processes, those of steps when they have saved."""
        for process in (*self.waiting, *self.rehearsing.values()):
            process.close()
        for _, process, _ in self.running.values():
            process.stop()
        for run, (_, process, began) in self.running.items():
            while process.status() is None:
                time.sleep(_POLL)
            process.close()
            self.spent[run] = round((time.monotonic() - began) / 60, 2)
        if self.rehearsals is not None:
            self.rehearsals.close()

    def report(self) -> None:
        """Adds the minutes of this stretch to those of earlier ones, and says what is left."""
        minutes = self.record["minutes"]
        for run, more in self.spent.items():
            minutes[run] = round(minutes.get(run, 0.0) + more, 2)
        write_whole(self.runs / _RECORD, json.dumps(self.record, indent=2) + "\n")
        left = [step.run for step in self.steps if not step.complete(self.config, self.runs)]
        for run, taken in minutes.items():
            print(f"recipe: {run} {taken} minutes", file=sys.stderr)
        print(f"recipe: left: {', '.join(left)}" if left else f"recipe: complete, {sum(minutes.values()):.0f} minutes of all steps together", file=sys.stderr)
