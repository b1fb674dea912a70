"""Trains one stage: `python train.py flash_vae_low_res --config tiny --out runs/vae`.

Run the same command again to continue a run that was stopped by time, by Ctrl-C or by SIGTERM.
"""

import dataclasses
import importlib
import inspect
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro

from configs import preset
from pikastream_jax.training.loop import NonFiniteError, run


@dataclasses.dataclass(frozen=True)
class Entry:
    """A stage that can be asked for."""

    build: str  # module:function; imported when asked for, so that one stage's needs are not every stage's
    needs: tuple[str, ...] = ()  # names that --init must give
    takes: tuple[str, ...] = ()  # names that --init may give: weights to start from, or for pictures

    def check(self, stage: str, init: dict[str, Path]) -> None:
        """Raises ValueError where `init` lacks what the stage needs, or holds what it would not look at."""
        known = (*self.needs, *self.takes)
        for name in self.needs:
            if name not in init:
                raise ValueError(f"{stage} needs --init {name}=PATH; it takes {', '.join(known)}")
        for name in init:
            if name not in known:
                raise ValueError(f"{stage} takes no --init {name}; it takes {', '.join(known) or 'none'}")


STAGES = {
    "flash_vae_low_res": Entry("pikastream_jax.training.flash_vae:build_low_res", takes=("flash_vae",)),
    "flash_vae_streaming": Entry("pikastream_jax.training.flash_vae:build_streaming", takes=("flash_vae",)),
    "flash_vae_decoder": Entry("pikastream_jax.training.flash_vae:build_decoder", needs=("flash_vae", "face_reader")),
    "audio_pretrain": Entry("pikastream_jax.training.audio_pretrain:build"),
    "text_pretrain": Entry("pikastream_jax.training.text_pretrain:build", needs=("clips",)),
    "latent_reader": Entry("pikastream_jax.training.latent_reader:build", needs=("clips",)),
    "dit_pretrain": Entry(
        "pikastream_jax.training.dit_pretrain:build", needs=("clips", "flash_vae", "reader"), takes=("denoiser", "audio", "text")
    ),
    "dit_causal": Entry("pikastream_jax.training.dit_causal:build", needs=("clips", "flash_vae", "reader", "denoiser")),
    "dit_guidance": Entry("pikastream_jax.training.dit_guidance:build", needs=("clips", "flash_vae", "denoiser"), takes=("guide",)),
    "face_estimator": Entry("pikastream_jax.training.face_estimator:build"),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train one stage of pikastream-jax. The same command again continues a stopped run."""

    stage: Annotated[str, tyro.conf.Positional]
    """One of flash_vae_low_res, flash_vae_streaming, flash_vae_decoder, audio_pretrain, text_pretrain, latent_reader, dit_pretrain, dit_causal, dit_guidance, face_estimator."""
    out: Path
    """Folder of the run: metrics, pictures, checkpoints."""
    config: str = "tiny"
    """Preset in configs/."""
    seed: int = 0
    """Everything random follows from it."""
    updates: int | None = None
    """Length of the whole run, for which the learning rate's fall is laid out; by default the stage's own."""
    learning_rate: float | None = None
    """Of the DiT's stages: the highest rate; a stretch that starts from trained weights wants a lower one than the stage's own."""
    steps: int | None = None
    """Stop after this many updates; the run can be continued."""
    minutes: float | None = None
    """Stop after about this many minutes; the run can be continued."""
    cpu_devices: int = 1
    """Without an accelerator: split the batch over this many devices, one to a core; it gains little, see docs/training.md."""
    init: tuple[str, ...] = ()
    """Weights to start from, each NAME=PATH (a .safetensors file or a run folder), for example flash_vae=runs/vae."""


def main() -> int:
    arguments = tyro.cli(Arguments)
    if (
        jax.config.jax_compilation_cache_dir is None
    ):  # not set by JAX_COMPILATION_CACHE_DIR: a resumed run starts sooner
        jax.config.update("jax_compilation_cache_dir", str(Path(__file__).resolve().parent / ".cache" / "jax"))
    try:
        if arguments.cpu_devices < 1:
            raise ValueError(f"--cpu-devices {arguments.cpu_devices} must be at least 1")
        if arguments.cpu_devices > 1:
            jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
        if arguments.stage not in STAGES:
            raise ValueError(f"unknown stage {arguments.stage!r}: choose one of {', '.join(STAGES)}")
        entry = STAGES[arguments.stage]
        init = parse_init(arguments.init)
        entry.check(arguments.stage, init)
        module, function = entry.build.split(":")
        build = getattr(importlib.import_module(module), function)
        if arguments.updates is not None and arguments.updates < 1:
            raise ValueError(f"--updates {arguments.updates} must be at least 1")
        asked = {name: getattr(arguments, name) for name in ("updates", "learning_rate")}
        asked = {name: value for name, value in asked.items() if value is not None}
        if "learning_rate" in asked and "learning_rate" not in inspect.signature(build).parameters:
            raise ValueError(f"{arguments.stage} takes no --learning-rate; leave it out")
        stage = build(preset(arguments.config), arguments.seed, init, **asked)
        try:
            run(stage, arguments.out, minutes=arguments.minutes, steps=arguments.steps)
        except NonFiniteError as error:
            raise ValueError(str(error)) from error
    except (ValueError, FileNotFoundError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 0


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
