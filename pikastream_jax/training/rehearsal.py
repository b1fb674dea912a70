"""Rehearsals: a step of the recipe done once in small, so that its programs stand in JAX's compilation cache when it is its turn.

A program is compiled for shapes, not for values. So a rehearsal needs no trained weights: every model starts from random numbers, clips and
trajectories are a handful, and a stage makes one update, one evaluation and one picture (`loop.rehearse`).
"""

import functools
import shutil
from pathlib import Path

import jax
import numpy as np

from configs import preset, stage_init
from pikastream_jax.dit import Denoiser
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.measuring.estimator import FaceEstimator
from pikastream_jax.nn.layers import functional
from pikastream_jax.rewards import REWARDS
from pikastream_jax.rewards.scoring import reward_model
from pikastream_jax.training.latent_reader import LatentReader
from pikastream_jax.training.stages import STAGES
from pikastream_jax.training.steps import Step
from pikastream_jax.weights.safetensors_io import save

_RECORDS = {"clips": "clips", "pairs": "ode_pairs"}  # what no stage makes, by the name under which stages take it
_DENOISERS = ("denoiser", "teacher", "audio", "text")  # the encoders are looked for within one


class Rehearsals:
    """The commands by which the steps of a recipe rehearse."""

    def __init__(self, config: str, runs: Path, seed: int):
        """
        Args:
          runs: the recipe's. What rehearsals make lies in `runs/rehearsal`, which is emptied now and removed by `close`.
          seed: the recipe's: it may stand in a program.
        """
        self._config, self._runs, self._folder, self._seed = config, runs, runs / "rehearsal", seed
        self.close()
        self._folder.mkdir(parents=True)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def possible(self, step: Step) -> bool:
        """Whether the records that the step reads are there."""
        return all(self._record(run).exists() for run in step.starts_from & set(_RECORDS.values()))

    def command(self, step: Step) -> list[str]:
        """The step's command line in small."""
        command = [*step.command(self._config, self._folder, self._seed), *step.few]
        if not step.is_stage:
            # Such commands look for what they start from among the runs, or take it by name.
            if "clips" in step.reads:
                return [*command, "--clips", str(self._record("clips")), "--teacher", str(self._weights["denoiser"])]
            return [*command, "--flash-vae", str(self._weights["flash_vae"])]
        init = {name: self._source(name) for name in self._taken(step)}
        return [*command, "--rehearse", *(["--init", *(f"{name}={path}" for name, path in init.items())] if init else [])]

    def _taken(self, step: Step) -> list[str]:
        """What the recipe hands over to a stage."""
        entry, always = STAGES[step.stage], stage_init(self._config).get(step.stage, {})
        return [name for name, runs in {**entry.needs, **entry.takes}.items() if set(runs) - set(step.without) or name in always]

    def _source(self, name: str) -> Path:
        return self._record(_RECORDS[name]) if name in _RECORDS else self._weights[name]

    def _record(self, run: str) -> Path:
        """The handful of a rehearsal, or else the recipe's own."""
        few = self._folder / run
        return few if few.exists() else self._runs / run

    @functools.cached_property
    def _weights(self) -> dict[str, Path]:
        """Random parameters of every model that is handed over, by the name under which stages take it."""
        config = preset(self._config)
        build = {
            "flash_vae": lambda rngs: FlashVAE(config.flash_vae, rngs=rngs),
            "denoiser": lambda rngs: Denoiser(config, rngs=rngs),
            "reader": lambda rngs: LatentReader(config, rngs=rngs),
            "face_reader": lambda rngs: FaceEstimator(rngs=rngs),
            **{f"reward_{name}": functools.partial(lambda rngs, name: reward_model(config, name, rngs=rngs), name=name) for name in REWARDS},
        }
        files, rng = {}, np.random.default_rng(0)
        for name, make in build.items():
            files[name] = self._folder / "random" / f"{name}.safetensors"
            # Not as the models start: that would have to be compiled.
            save(files[name], jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), functional(make).abstract))
        return files | {name: files["denoiser"] for name in _DENOISERS}
