"""The recipe's steps: which command makes which run, and from which others."""

import dataclasses
from pathlib import Path

from configs import stage_settings, step_flags
from pikastream_jax.training.checkpoint import CHECKPOINTS
from pikastream_jax.training.settings import changed
from pikastream_jax.training.stages import ENCODERS, STAGES, TEACHERS


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the recipe.

    Attributes:
      run: name of the folder that it makes, within the folder of all runs.
      stage: the stage that makes it, or the module to run with `python -m`.
      flags: what differs from the stage's defaults.
      reads: runs that a command which is no stage starts from; of a stage `STAGES` tells them.
      without: of what the stage may take, the runs that it makes nothing of with these flags.
      few: flags by which such a command makes just enough to rehearse with.
    """

    run: str
    stage: str
    flags: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    few: tuple[str, ...] = ()

    @property
    def is_stage(self) -> bool:
        return self.stage in STAGES

    @property
    def starts_from(self) -> set[str]:
        """Runs that it would take something from, were they there."""
        if not self.is_stage:
            return set(self.reads)
        entry = STAGES[self.stage]
        return {run for runs in (*entry.needs.values(), *entry.takes.values()) for run in runs} - set(self.without)

    def command(self, config: str, runs: Path, seed: int) -> list[str]:
        """The command line, without the interpreter."""
        common = ["--config", config, "--runs", str(runs), "--seed", str(seed)]
        program = ["train.py", self.stage] if self.is_stage else ["-m", self.stage]
        return [*program, *common, "--out", str(runs / self.run), *self.flags, *step_flags(config).get(self.run, ())]

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
    # Of another seed than the estimator that measures: no weights are trained to please that one.
    Step("face_reader", "face_estimator", ("--seed", "1")),
    Step("audio_pretrain", "audio_pretrain"),
    Step("vae_streaming", "vae_streaming"),
    Step("clips", "pikastream_jax.training.clips", reads=ENCODERS, few=("--count", "32", "--held-out", "32")),
    Step("vae_adversarial", "vae_adversarial"),
    Step("latent_reader", "latent_reader"),
    Step("text_pretrain", "text_pretrain"),
    Step("dit_pretrain", "dit_pretrain"),
    Step("dit_sft", "dit_sft"),
    Step("reward_identity", "reward_identity"),
    Step("reward_lip_sync", "reward_lip_sync"),
    Step("reward_motion", "reward_motion"),
    Step("reward_artifact", "reward_artifact"),
    Step("dit_reward", "dit_reward"),
    Step("ode_pairs", "pikastream_jax.training.ode_pairs", reads=("clips", *TEACHERS), few=("--count", "8", "--held-out", "8")),
    Step("dit_causal", "dit_causal"),
    Step("dit_self_forcing", "dit_self_forcing"),
    Step("dit_student_reward", "dit_student_reward"),
    Step("dit_causal_rolling", "dit_causal", ("--objective", "data", "--schedule", "rolling", "--latent-frames", "18"), without=("ode_pairs",)),
)
