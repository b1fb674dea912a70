"""Trains one stage: `python train.py flash_vae_low_res --config tiny --out runs/vae`.

Run the same command again to continue a run that was stopped by time, by Ctrl-C or by SIGTERM.
"""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro

from configs import preset

# name -> module:function. Imported when asked for, so that one stage's needs are not every stage's.
STAGES = {
    "flash_vae_low_res": "pikastream_jax.training.flash_vae:build_low_res",
    "flash_vae_streaming": "pikastream_jax.training.flash_vae:build_streaming",
    "flash_vae_decoder": "pikastream_jax.training.flash_vae:build_decoder",
    "audio_pretrain": "pikastream_jax.training.audio_pretrain:build",
    "text_pretrain": "pikastream_jax.training.text_pretrain:build",
    "dit_pretrain": "pikastream_jax.training.dit_pretrain:build",
    "dit_causal": "pikastream_jax.training.dit_causal:build",
    "face_estimator": "pikastream_jax.training.face_estimator:build",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train one stage of pikastream-jax. The same command again continues a stopped run."""

    stage: Annotated[str, tyro.conf.Positional]
    """One of flash_vae_low_res, flash_vae_streaming, flash_vae_decoder, audio_pretrain, text_pretrain, dit_pretrain, dit_causal, face_estimator."""
    out: Path
    """Folder of the run: metrics, pictures, checkpoints."""
    config: str = "tiny"
    """Preset in configs/."""
    seed: int = 0
    """Everything random follows from it."""
    updates: int | None = None
    """Length of the whole run, for which the learning rate's fall is laid out; by default the stage's own."""
    steps: int | None = None
    """Stop after this many updates; the run can be continued."""
    minutes: float | None = None
    """Stop after about this many minutes; the run can be continued."""
    cpu_devices: int = 1
    """Without an accelerator: split the batch over this many cores, which is faster than one device on all of them."""
    init: tuple[str, ...] = ()
    """Weights to start from, each NAME=PATH (a .safetensors file or a run folder), for example flash_vae=runs/vae."""


def main() -> int:
    arguments = tyro.cli(Arguments)
    if (
        jax.config.jax_compilation_cache_dir is None
    ):  # not set by JAX_COMPILATION_CACHE_DIR: a resumed run starts sooner
        jax.config.update("jax_compilation_cache_dir", str(Path(__file__).resolve().parent / ".cache" / "jax"))
    try:
        if arguments.stage not in STAGES:
            raise ValueError(f"unknown stage {arguments.stage!r}: choose one of {', '.join(STAGES)}")
        from pikastream_jax.training.loop import NonFiniteError, run

        module, function = STAGES[arguments.stage].split(":")
        build = getattr(importlib.import_module(module), function)
        if arguments.updates is not None and arguments.updates < 1:
            raise ValueError(f"--updates {arguments.updates} must be at least 1")
        length = {} if arguments.updates is None else {"updates": arguments.updates}
        stage = build(preset(arguments.config), arguments.seed, parse_init(arguments.init), **length)
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
