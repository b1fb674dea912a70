"""Trains one stage: `python train.py vae_low_res --config tiny`; `python train.py --help` lists them.

Run the same command again to continue a run that was stopped by time, by Ctrl-C or by SIGTERM.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro

from configs import preset, stage_init, stage_settings
from pikastream_jax.training.loop import NonFiniteError, rehearse, run
from pikastream_jax.training.mesh import make_mesh
from pikastream_jax.training.origins import origins
from pikastream_jax.training.processes import Processes
from pikastream_jax.training.recipe import run_recipe
from pikastream_jax.training.replay import replay
from pikastream_jax.training.settings import changed
from pikastream_jax.training.stages import STAGES, Entry
from pikastream_jax.training.worker import COMPILED


@dataclasses.dataclass(frozen=True)
class Run:
    """How a stage is run, whichever it is."""

    config: str = "tiny"
    """Preset in configs/."""
    runs: Path | None = None
    """Folder of all runs, runs/CONFIG by default. What a stage starts from is looked for there."""
    out: Path | None = None
    """Folder of this run: metrics, pictures, checkpoints. By default named after the stage, within the folder of all runs."""
    init: tuple[str, ...] = ()
    """What to start from instead, each NAME=PATH (a .safetensors file or a run folder), for example flash_vae=runs/vae."""
    seed: int = 0
    """Everything random follows from it."""
    steps: int | None = None
    """Stop after this many updates; the run can be continued."""
    minutes: float | None = None
    """Stop after about this many minutes; the run can be continued."""
    fsdp: int = 1
    """Split the model over this many devices. The rest of the devices split the batch."""
    sequence: int = 1
    """Split the latent frames of long clips over this many devices."""
    keep: int = 2
    """Checkpoints that stay, the newest."""
    replay: bool = False
    """Don't train: run the update again at which a run stopped because something was not finite, and tell what went wrong first."""
    rehearse: bool = False
    """Don't train: make one update, one evaluation and one picture, which puts all programs into the compilation cache. The folder, which must hold no run,
    is by default named after the stage within `rehearsal`, within the folder of all runs."""
    cpu_devices: int = 1
    """Without an accelerator: pose as this many devices, one to a core; it gains little, see docs/training.md."""
    processes: int = 1
    """How many processes, one to a machine as a rule, run this command together, each with its own --process; --out lies where all see it."""
    process: int | None = None
    """Which of them this is, from 0."""
    coordinator: str | None = None
    """HOST:PORT where process 0 waits for the others."""

    @property
    def runs_folder(self) -> Path:
        return Path("runs") / self.config if self.runs is None else self.runs


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All stages in order, each from what the ones before it made. The same command goes on with a recipe that was stopped."""

    config: str = "tiny"
    """Preset in configs/."""
    runs: Path | None = None
    """Folder of all runs, runs/CONFIG by default."""
    seed: int = 0
    """Everything random follows from it."""
    minutes: float | None = None
    """Stop after about this many minutes."""
    jobs: int = 1
    """Steps that run at once, each as soon as what it starts from is there; for a GPU, which one of the small presets' steps does not fill."""
    rehearse: bool = False
    """Compile the programs of steps whose turn is yet to come, and keep processes waiting for the next ones."""


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name, *flags = arguments
    try:
        if name == "recipe":
            told = tyro.cli(Recipe, args=flags, prog="train.py recipe")
            run_recipe(told.config, told.runs or Path("runs") / told.config, told.seed, told.minutes, jobs=told.jobs, rehearse=told.rehearse)
        elif name in STAGES:
            _train(name, STAGES[name], flags)
        else:
            raise ValueError(f"unknown stage {name!r}: choose one of {', '.join(STAGES)}, or recipe for all of them")
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 0


def _train(name: str, entry: Entry, flags: list[str]) -> None:
    # The preset decides what the stage's own flags are by default, so it is read first.
    known, _ = tyro.cli(Run, args=flags, return_unknown_args=True, add_help=False)
    config, module = preset(known.config), entry.load()
    defaults = changed(module.Settings(), stage_settings(known.config).get(name, {}))
    together = dataclasses.make_dataclass(
        name,
        [
            ("run", Annotated[Run, tyro.conf.arg(name="")]),
            ("settings", Annotated[module.Settings, tyro.conf.arg(name="")]),
        ],
        frozen=True,
    )
    told = tyro.cli(together, args=flags, default=together(Run(), defaults), prog=f"train.py {name}", description=module.__doc__)
    how = told.run
    if jax.config.jax_compilation_cache_dir is None:  # not set by JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(COMPILED))
    if how.cpu_devices < 1:
        raise ValueError(f"--cpu-devices {how.cpu_devices} must be at least 1")
    if how.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", how.cpu_devices)
    Processes(how.coordinator, how.processes, how.process).join()
    mesh = make_mesh(how.fsdp, how.sequence)
    given = stage_init(how.config).get(name, {}) | parse_init(how.init)
    init = entry.hand_over(name, given, how.runs_folder, told.settings.passed_over(given))
    stage = module.build(config, how.seed, init, told.settings)
    stage = dataclasses.replace(stage, config=stage.config | {"init": origins(init)})
    folder = how.out or how.runs_folder / ("rehearsal" if how.rehearse else "") / name
    if how.replay:
        print(replay(stage, folder))
        return
    if how.rehearse:
        rehearse(stage, folder, mesh=mesh)
        return
    try:
        run(stage, folder, minutes=how.minutes, steps=how.steps, keep=how.keep, mesh=mesh)
    except NonFiniteError as error:
        raise ValueError(str(error)) from error


def _overview() -> str:
    """The stages, a line each; `train.py STAGE --help` tells the rest."""
    lines = [f"  {name:20} {(entry.load().__doc__ or '').splitlines()[0]}" for name, entry in STAGES.items()]
    return "\n".join(["usage: train.py STAGE [--config tiny] [options]; train.py STAGE --help lists them", "", *lines, f"  {'recipe':20} {Recipe.__doc__.splitlines()[0]}"])


def parse_init(pairs: tuple[str, ...]) -> dict[str, Path]:
    """("flash_vae=runs/vae",) -> {"flash_vae": Path("runs/vae")}, checking that each path exists."""
    init = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not (name and separator and path):
            raise ValueError(f"--init {pair!r} must be NAME=PATH, for example flash_vae=runs/vae")
        if not Path(path).exists():
            raise ValueError(f"--init {name}: there is no {path}")
        init[name] = Path(path)
    return init


if __name__ == "__main__":
    sys.exit(main())
