"""The whole recipe, stage after stage: `python train.py recipe --config nano`.

Every step is a command of its own, in a process of its own, which leaves its result in a folder of `runs/CONFIG` and finds there what it
starts from. The recipe can be stopped anywhere and goes on with the same command: steps that are complete are passed over, and a stage that
was cut short continues at its last checkpoint.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from configs import preset, stage_settings
from pikastream_jax.training.checkpoint import CHECKPOINTS
from pikastream_jax.training.settings import changed
from pikastream_jax.training.stages import STAGES


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the recipe.

    Attributes:
      run: name of the folder that it makes, within the folder of all runs.
      stage: the stage that makes it, or the module to run with `python -m`.
      flags: what differs from the stage's defaults.
    """

    run: str
    stage: str
    flags: tuple[str, ...] = ()

    @property
    def is_stage(self) -> bool:
        return self.stage in STAGES

    def command(self, config: str, runs: Path, seed: int) -> list[str]:
        """The command line, by the interpreter that runs this one."""
        common = ["--config", config, "--runs", str(runs), "--seed", str(seed)]
        program = ["train.py", self.stage] if self.is_stage else ["-m", self.stage]
        return [sys.executable, *program, *common, "--out", str(runs / self.run), *self.flags]

    def complete(self, config: str, runs: Path) -> bool:
        """Whether nothing is left to do: a stage has done all its updates, another command has put its result in place."""
        folder = runs / self.run
        if not self.is_stage:
            return folder.exists()
        steps = [int(path.name) for path in (folder / CHECKPOINTS).glob("*") if path.name.isdecimal()]
        settings = changed(STAGES[self.stage].load().Settings(), stage_settings(config).get(self.stage, {}))
        return bool(steps) and max(steps) >= settings.updates


RECIPE = (
    Step("vae_low_res", "vae_low_res"),
    Step("vae_streaming", "vae_streaming"),
    Step("vae_adversarial", "vae_adversarial"),
    Step("clips", "pikastream_jax.training.clips"),
    Step("audio_pretrain", "audio_pretrain"),
    Step("text_pretrain", "text_pretrain"),
    Step("latent_reader", "latent_reader"),
    Step("dit_pretrain", "dit_pretrain"),
    Step("dit_sft", "dit_sft"),
    Step("reward_identity", "reward_identity"),
    Step("reward_lip_sync", "reward_lip_sync"),
    Step("reward_motion", "reward_motion"),
    Step("reward_artifact", "reward_artifact"),
    Step("dit_reward", "dit_reward"),
    Step("ode_pairs", "pikastream_jax.training.ode_pairs"),
    Step("dit_causal", "dit_causal"),
    # Half the sequences of an update in the sequential schedule, which then takes as long.
    Step("dit_causal_rolling", "dit_causal", ("--objective", "data", "--schedule", "rolling", "--latent-frames", "18", "--batch", "3")),
    Step("dit_self_forcing", "dit_self_forcing"),
    Step("dit_student_reward", "dit_student_reward"),
)


def run_recipe(
    config: str,
    runs: Path,
    seed: int,
    minutes: float | None,
    steps: Sequence[Step] = RECIPE,
    call: Callable[[list[str]], int] | None = None,
) -> None:
    """Runs the steps that are not complete, in order.

    Args:
      minutes: stop after about this long; the same command goes on. A command that is no stage is not begun in the last minute, and not
        cut short.
      call: runs a command and gives its exit status; by default a process that Ctrl-C and SIGTERM reach, too.

    Raises:
      ValueError: no such preset, or a step failed.
    """
    preset(config)
    call = call or _call
    started, spent = time.monotonic(), {}
    for number, step in enumerate(steps, start=1):
        if step.complete(config, runs):
            continue
        left = None if minutes is None else minutes - (time.monotonic() - started) / 60
        if left is not None and left < 1:
            break
        command = step.command(config, runs, seed)
        if step.is_stage and left is not None:
            command += ["--minutes", f"{left:.2f}"]
        print(f"recipe: step {number} of {len(steps)}, {step.run}", file=sys.stderr, flush=True)
        began = time.monotonic()
        status = call(command)
        spent[step.run] = round((time.monotonic() - began) / 60, 2)
        if status:
            raise ValueError(f"the recipe stopped at {step.run} (exit status {status}); the same command goes on from there")
        if not step.complete(config, runs):
            break
    _report(config, runs, steps, spent)


def _report(config: str, runs: Path, steps: Sequence[Step], spent: dict[str, float]) -> None:
    """Adds the minutes of this stretch to those of earlier ones, in `recipe.json`, and says what is left."""
    record = runs / "recipe.json"
    minutes = json.loads(record.read_text()) if record.is_file() else {}
    for run, more in spent.items():
        minutes[run] = round(minutes.get(run, 0.0) + more, 2)
    runs.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(minutes, indent=2) + "\n")
    left = [step.run for step in steps if not step.complete(config, runs)]
    for run, taken in minutes.items():
        print(f"recipe: {run} {taken} minutes", file=sys.stderr)
    print(f"recipe: left: {', '.join(left)}" if left else f"recipe: complete, {sum(minutes.values()):.0f} minutes", file=sys.stderr)


def _call(command: list[str]) -> int:
    """Runs a command to its end. What asks this process to stop asks that one, which saves and leaves; then the recipe leaves, too."""
    process = subprocess.Popen(command)
    # A terminal sends Ctrl-C to both, and a second one would keep the other from saving: here it is only not to end this process.
    handlers = {signal.SIGINT: lambda number, frame: None, signal.SIGTERM: lambda number, frame: process.send_signal(number)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
