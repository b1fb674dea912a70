"""Every stage by name, and which earlier runs hand their weights over to it."""

import dataclasses
import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pikastream_jax.config import Config

HandOver = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A stage that can be asked for.

    Attributes:
      module: has `Settings`, `build` and a docstring; imported when asked for, so that one stage's needs are not every stage's.
      needs: what `build` must be given, and the runs that hand it over, the best first.
      takes: the same for what it may be given.
    """

    module: str
    needs: HandOver = dataclasses.field(default_factory=dict)
    takes: HandOver = dataclasses.field(default_factory=dict)

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)

    def hand_over(self, stage: str, given: Mapping[str, Path], runs: Path, passed_over: Collection[str] = ()) -> dict[str, Path]:
        """Everything that the stage starts from: what is `given`, and else what lies in the folder `runs`, but for what is `passed_over`.

        Raises:
          ValueError: something is given that the stage would not look at, or something needed is neither given nor there.
        """
        known = {**self.needs, **self.takes}
        for name in given:
            if name not in known:
                raise ValueError(f"{stage} takes no --init {name}; it takes {', '.join(known) or 'none'}")
        found = dict(given)
        for name, candidates in known.items():
            there = [runs / run for run in candidates if (runs / run).exists()]
            if name in given or name in passed_over:
                continue
            if there:
                found[name] = there[0]
            elif name in self.needs:
                raise ValueError(
                    f"{stage} needs {name}, and {runs} has no {' or '.join(candidates)}: train that first, or give --init {name}=PATH"
                )
        return found


_PACKAGE = "pikastream_jax.training."
FLASH_VAE = ("vae_adversarial", "vae_streaming")
ENCODERS = FLASH_VAE[::-1]  # the adversarial stage leaves the encoder as it is, so clips need not wait for it
_CLIPS = {"clips": ("clips",), "flash_vae": FLASH_VAE}
_READER = {"reader": ("latent_reader",)}
_REWARDS = {f"reward_{name}": (f"reward_{name}",) for name in ("identity", "lip_sync", "motion", "artifact")}
TEACHERS = ("dit_reward", "dit_sft", "dit_pretrain")
STUDENTS = ("dit_student_reward", "dit_self_forcing", "dit_guidance", "dit_causal")

STAGES = {
    "vae_low_res": Entry(_PACKAGE + "vae_low_res", takes={"flash_vae": ()}),
    "vae_streaming": Entry(_PACKAGE + "vae_streaming", needs={"flash_vae": ("vae_low_res",)}),
    "vae_adversarial": Entry(
        _PACKAGE + "vae_adversarial", needs={"flash_vae": ("vae_streaming",)}, takes={"face_reader": ("face_reader",)}
    ),
    "vae_conv3d": Entry(_PACKAGE + "vae_conv3d", needs={"flash_vae": ("vae_streaming",)}),
    "audio_pretrain": Entry(_PACKAGE + "audio_pretrain", takes={"audio": ()}),
    "text_pretrain": Entry(_PACKAGE + "text_pretrain", needs={"clips": ("clips",)}),
    "latent_reader": Entry(_PACKAGE + "latent_reader", needs={"clips": ("clips",)}),
    "face_estimator": Entry(_PACKAGE + "face_estimator"),
    **{name: Entry(_PACKAGE + name, takes={"flash_vae": FLASH_VAE}) for name in _REWARDS},
    "dit_pretrain": Entry(
        _PACKAGE + "dit_pretrain",
        needs=_CLIPS | _READER,
        takes={"denoiser": (), "audio": ("audio_pretrain",), "text": ("text_pretrain",)},
    ),
    "dit_sft": Entry(_PACKAGE + "dit_sft", needs=_CLIPS | _READER | {"denoiser": ("dit_pretrain",)}),
    "dit_reward": Entry(_PACKAGE + "dit_reward", needs=_CLIPS | _READER | _REWARDS | {"denoiser": TEACHERS[1:]}),
    "dit_causal": Entry(_PACKAGE + "dit_causal", needs=_CLIPS | _READER | {"denoiser": TEACHERS}, takes={"pairs": ("ode_pairs",)}),
    "dit_guidance": Entry(_PACKAGE + "dit_guidance", needs=_CLIPS | {"denoiser": ("dit_causal",)}, takes={"guide": ()}),
    "dit_self_forcing": Entry(
        _PACKAGE + "dit_self_forcing",
        needs=_CLIPS | _READER | {"denoiser": ("dit_causal",), "teacher": TEACHERS},
        takes={"critic": ()},
    ),
    "dit_student_reward": Entry(
        _PACKAGE + "dit_student_reward", needs=_CLIPS | _READER | _REWARDS | {"denoiser": ("dit_self_forcing", "dit_causal")}
    ),
}


def best_run(runs: Path, candidates: tuple[str, ...], flag: str) -> Path:
    """The first of the candidates, the best first, that has been trained; for commands that are no stage.

    Args:
      flag: of the command, by which another can be named.

    Raises:
      FileNotFoundError: none has.
    """
    for name in candidates:
        if (runs / name).exists():
            return runs / name
    raise FileNotFoundError(f"{runs} has no {' or '.join(candidates)}: train one first, or name another with {flag}")


def as_trained(config: Config, record: Mapping[str, Any], **stream: Any) -> Config:
    """The configuration, streaming in the schedule that a run of `dit_causal` was trained for.

    Args:
      record: the run's config.json.
      stream: fields of `StreamConfig` that shall differ.
    """
    settings = record.get("config", {}).get("stage", {})
    schedule = settings.get("schedule") if isinstance(settings, dict) else None
    changes = ({} if schedule is None else {"schedule": schedule}) | stream
    return dataclasses.replace(config, stream=dataclasses.replace(config.stream, **changes))
