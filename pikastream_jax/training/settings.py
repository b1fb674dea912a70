"""What every stage can be told: its length, its batch, its optimiser. A stage's own module adds to it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from configs import stage_settings
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.training_form import Form

Settings = TypeVar("Settings")
Arguments = TypeVar("Arguments")
Optimiser = Annotated[OptimiserConfig, tyro.conf.arg(name="")]  # its flags are not called --optimiser.learning-rate but --learning-rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Settings of a stage; each is a flag of `train.py`."""

    updates: int
    """Length of the whole run, for which the learning rate's fall is laid out."""
    batch: int
    """Rows of an update, over all devices."""
    optimiser: Optimiser
    ema: float = 0.99
    """Decay of the averaged weights, which are evaluated and handed on."""

    def __post_init__(self):
        for name in ("updates", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema {self.ema} must lie in [0, 1)")

    def every(self, usual: int) -> int:
        """Updates from one evaluation to the next: `usual`, but a fifth of a short run, so that it can be told whether it converged, and a tenth of a long
        one, since each holds the updates up."""
        return max(1, min(usual, self.updates // 5), self.updates // 10)

    def passed_over(self, given: Mapping[str, Path]) -> tuple[str, ...]:
        """Of what the stage may start from, what it does not take from the folder of runs though it lies there.

        Args:
          given: what was named for it to start from.
        """
        del given
        return ()

    def record(self) -> dict[str, Any]:
        """What a run is continued with: everything but its length."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "updates"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTSettings(StageSettings):
    """Settings of a stage that trains a DiT, which `training_form(model, settings.form)` computes."""

    form: Annotated[Form, tyro.conf.arg(name="")] = Form()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemindedSettings(DiTSettings):
    """Settings of a stage with an objective of its own, beside which it may keep the loss on clips (`clip_loss`)."""

    data: float = 0.0
    """Weight of the loss on clips that the model was trained with before, which keeps what no reward asks for, such as blinks; 0 leaves it out."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.data < float("inf"):
            raise ValueError(f"data {self.data} must be finite and at least 0: it is the weight of the loss on clips")


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The same settings with other values, those of an inner dataclass given as a mapping of their own.

    Raises:
      ValueError: a name that the settings don't have, or a value that they refuse.
    """
    known = {field.name for field in dataclasses.fields(settings)}
    if unknown := set(changes) - known:
        raise ValueError(f"{type(settings).__module__} has no setting {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    values = {
        name: changed(getattr(settings, name), value) if isinstance(value, Mapping) else value for name, value in changes.items()
    }
    return dataclasses.replace(settings, **values)


def arguments_of(kind: type[Arguments], name: str, given: Sequence[str]) -> Arguments:
    """The arguments of a command of the recipe that is no stage. What is not given is as the preset, `--config`, wants it.

    Args:
      kind: a dataclass with a field `config`, whose fields all have defaults.
      name: of the command, as in `configs.stage_settings`.
    """
    known, _ = tyro.cli(kind, args=given, return_unknown_args=True, add_help=False)
    return tyro.cli(kind, args=given, default=changed(kind(), stage_settings(known.config).get(name, {})))
