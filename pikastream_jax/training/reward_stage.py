"""What the four stages that train a reward have in common: the model, its calibration, and how true held-out clips score."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.nn.layers import Functional, Params, initial_params
from pikastream_jax.rewards import Rewards, Shown
from pikastream_jax.rewards.scoring import reward_model
from pikastream_jax.training.clips import SPEECH
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.optimiser import make_optimiser
from pikastream_jax.training.origins import origins
from pikastream_jax.training.processes import gather, on_one_device
from pikastream_jax.training.reward_clips import Painter, TalkingClips, talking_clips
from pikastream_jax.training.settings import StageSettings

LATENT_FRAMES = 6  # of the clips that rewards are calibrated and judged on: 24 video frames, about a second
_CALIBRATED = 2  # true clips scored in an update


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings(StageSettings):
    """What every reward's stage can be told."""

    autoencoded: float = 0.5
    """Share of all pictures, true or not, that pass through FlashVAE where it is given."""
    held_out: int = 48
    """True held-out clips that the reward is judged on (of identity 8 times as many people, of artifacts half as many clips); half as many others calibrate it."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.autoencoded <= 1:
            raise ValueError(f"autoencoded {self.autoencoded} must lie in [0, 1]: it is a share")
        if self.held_out < 2:
            raise ValueError(f"held_out {self.held_out} must be at least 2 clips: sound is exchanged between them")


Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a reward is judged with.

    Attributes:
      model: the reward.
      painter: draws pictures as those of the training.
      clips: true clips of held-out people with a held-out voice.
    """

    model: Functional
    painter: Painter
    clips: TalkingClips


def reward_stage(
    name: str,
    config: Config,
    seed: int,
    init: dict[str, Path],
    settings: RewardSettings,
    *,
    data: Callable[[Painter], Any],
    loss: Callable[[nnx.Module, Any, Array], tuple[Float[Array, ""], dict[str, Array]]],
    judge: Callable[[HeldOut], Callable[[Params], Figures]],
) -> Stage:
    """The stage `reward_<name>`.

    Args:
      data: draws what every update draws from.
      loss: (model, that data, key) -> the loss and its parts.
      judge: prepares a judgement, once: from averaged parameters to figures on held-out clips, `loss` among them.
    """
    model = Rewards.of(config).models[name]
    optimiser = make_optimiser(model.abstract, settings.optimiser, settings.updates)
    painter = functools.cache(lambda: Painter(config, init.get("flash_vae"), settings.autoencoded))

    def true_clips(split: str, count: int) -> TalkingClips:
        return talking_clips(config, painter(), split, seed, count, LATENT_FRAMES)

    held_out = functools.cache(lambda: HeldOut(model, painter(), true_clips("held_out", settings.held_out)))
    judgement = functools.cache(lambda: judge(held_out()))
    score = jax.jit(lambda params, clips: each_clip(model.bind(params), clips.shown()))

    def initial_state() -> TrainState:
        params = initial_params(lambda rngs: reward_model(config, name, rngs=rngs), jax.random.key(seed))
        return TrainState.start(params, optimiser)

    def everything() -> dict[str, Any]:
        return {"train": data(painter()), "calibration": true_clips("validation", max(2, settings.held_out // 2))}

    def update(state: TrainState, key: Array, data: dict, batch: dict) -> tuple[TrainState, dict]:
        k_loss, k_calibration = jax.random.split(key)

        def objective(params: Params) -> tuple[Array, dict]:
            value, parts = loss(model.bind(params), data["train"], k_loss)
            return value, {"loss": value} | parts

        gradient, parts = jax.grad(objective, has_aux=True)(state.params)
        state = state.descend(gradient, optimiser, settings.ema)
        return calibrate(model, state, data["calibration"], k_calibration), parts

    def evaluate(state: TrainState, data: dict) -> Figures:
        params = gather(state.ema)
        with on_one_device():  # it is small: several processes judge the whole of it, each for itself
            figures = judgement()(params)
            scores = np.asarray(score(params, held_out().clips))
        return figures | {"score_mean": float(scores.mean()), "score_std": float(scores.std())}

    return Stage(
        name=f"reward_{name}",
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        data=everything,
        config={"preset": config.name, "stage": settings.record()} | origins({"speech": SPEECH}),
        evaluate=evaluate,
        evaluate_every=max(1, settings.updates // 5),
    )


def calibrate(model: Functional, state: TrainState, clips: TalkingClips, key: Array) -> TrainState:
    """Moves the calibration towards mean and spread of the scores of a few true clips of the validation split.

    Moving averages, quick at first: by the end of a stage, when the weights hardly move, they rest on some hundred scores. Those of the averaged
    weights count, because they are what is handed on.
    """
    index = jax.random.choice(key, clips.video.shape[0], (_CALIBRATED,), replace=False)
    raw = model.bind(state.ema).raw(jax.tree.map(lambda leaf: leaf[index], clips).shown())
    keep = jnp.minimum(0.99, (1.0 + state.step) / (10.0 + state.step))
    old = state.ema["calibration"]
    mean = keep * old["mean"] + (1 - keep) * raw.mean()
    variance = keep * old["std"] ** 2 + (1 - keep) * jnp.mean((raw - mean) ** 2)
    new = {"calibration": {"mean": mean, "std": jnp.sqrt(variance + 1e-8)}}
    return dataclasses.replace(state, params=state.params | new, ema=state.ema | new)


def each_clip(score: Callable[[Shown], Float[Array, " b"]], shown: Shown) -> Float[Array, " n"]:
    """Scores of many clips, a few at a time."""
    return jax.lax.map(lambda one: score(jax.tree.map(lambda leaf: leaf[None], one))[0], shown, batch_size=4)


def share_above(better: Float[np.ndarray, " n"], worse: Float[np.ndarray, " n"]) -> float:
    """Share of pairs in which the first is higher; ties count as half."""
    better, worse = np.asarray(better), np.asarray(worse)
    return float(np.mean((better > worse) + 0.5 * (better == worse)))
