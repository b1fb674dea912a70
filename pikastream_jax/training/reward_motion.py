"""The reward for motion: true clips against the same ones reversed, shuffled or frozen in time, and against shaky ones.

Cross entropy on the mean logit of a window, true ones and wrong ones with equal weight. Beside it the network that reads frames learns what the
renderer was told. Frames are read one by one, so of a true window only the readings are reversed, shuffled and frozen: one reading serves four windows.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.data.face import FaceState
from pikastream_jax.nn.layers import Params
from pikastream_jax.rewards.motion import FACE, READINGS, MotionReward
from pikastream_jax.training.loop import Stage
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.reward_clips import (
    Painter,
    TalkingClips,
    Window,
    check_latent_frames,
    grain,
    talking_clips,
    window_of,
)
from pikastream_jax.training.reward_stage import (
    LATENT_FRAMES,
    Figures,
    HeldOut,
    RewardSettings,
    each_clip,
    reward_stage,
    share_above,
)
from pikastream_jax.training.settings import Optimiser

FRAMES = 24  # video frames of a training window
FROZEN = (6, 16)  # video frames that a frozen stretch lasts, both included
WRONG = ("reversed", "shuffled", "frozen", "shaky")
_HELD_OUT_SEED = 2_000_003


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(RewardSettings):
    """Settings of the stage; a row of a batch is a true window with the wrong ones made of it, and a shaky one."""

    updates: int = 500
    batch: int = 12
    optimiser: Optimiser = OptimiserConfig(learning_rate=2e-3, warmup_steps=30, weight_decay=0.01)
    clips: int = 192
    """True clips that are drawn once at the start, and half as many shaky ones."""
    latent_frames: int = 12
    """Length of those clips."""
    noise: float = 0.03
    """Largest standard deviation of the noise on pictures."""
    told: float = 1.0
    """Weight of the squared error of what is read, beside the classification's 1."""

    def __post_init__(self):
        super().__post_init__()
        check_latent_frames(self.latent_frames, FRAMES)


def reversed_frames(video: Float[Array, "t ..."]) -> Float[Array, "t ..."]:
    """Backwards in time."""
    return video[::-1]


def shuffled_frames(key: Array, video: Float[Array, "t ..."], block: int) -> Float[Array, "t ..."]:
    """Blocks of `block` frames in random order, each in itself as it was."""
    t = video.shape[0]
    order = jax.random.permutation(key, t // block)
    return video.reshape(t // block, block, *video.shape[1:])[order].reshape(video.shape)


def frozen_frames(key: Array, video: Float[Array, "t ..."]) -> Float[Array, "t ..."]:
    """One stretch stands still; then the face is where it would have been."""
    t = video.shape[0]
    k_length, k_start = jax.random.split(key)
    length = jax.random.randint(k_length, (), FROZEN[0], FROZEN[1] + 1)
    start = jax.random.randint(k_start, (), 0, t - length + 1)
    frame = jnp.arange(t)
    return video[jnp.where((frame >= start) & (frame < start + length), start, frame)]


# Standard deviations of what is added to each frame of a shaky clip, at full strength.
_SHAKES = {"yaw": 0.06, "pitch": 0.04, "roll": 0.04, "shift_x": 0.008, "shift_y": 0.008, "gaze_x": 0.5, "gaze_y": 0.4, "blink": 0.5}


def shaken(key: Array, states: FaceState) -> FaceState:
    """Head, eyes or lids tremble from frame to frame, each in half of the clips, with a third to all of the full strength."""
    k_strength, k_which, k_noise = jax.random.split(key, 3)
    names = tuple(_SHAKES)
    groups = jnp.array([0, 0, 0, 0, 0, 1, 1, 2])  # head, eyes, lids
    chosen = jax.random.bernoulli(k_which, 0.5, (3,))
    chosen = jnp.where(chosen.any(), chosen, jnp.array([True, False, False]))
    strength = jax.random.uniform(k_strength, (), minval=1 / 3) * chosen[groups]
    noise = jax.random.normal(k_noise, (len(names), *states.yaw.shape))
    moved = {name: getattr(states, name) + strength[i] * _SHAKES[name] * noise[i] for i, name in enumerate(names)}
    for name, low in {"gaze_x": -1.0, "gaze_y": -1.0, "blink": 0.0}.items():
        moved[name] = jnp.clip(moved[name], low, 1.0)
    return dataclasses.replace(states, **moved)


def wrong_motions(key: Array, video: Float[Array, "t ..."]) -> dict[str, Float[Array, "t ..."]]:
    """What is made of one true window."""
    k_shuffle, k_block, k_freeze = jax.random.split(key, 3)
    singly, in_fours = shuffled_frames(k_shuffle, video, 1), shuffled_frames(k_shuffle, video, 4)
    return {
        "reversed": reversed_frames(video),
        "shuffled": jnp.where(jax.random.bernoulli(k_block, 0.3), singly, in_fours),
        "frozen": frozen_frames(k_freeze, video),
    }


def two_sided(true: Float[Array, " n"], wrong: Float[Array, " m"]) -> Float[Array, ""]:
    """Cross entropy of logits, true and wrong clips with equal weight however many they are."""
    return (jnp.mean(jax.nn.softplus(-true)) + jnp.mean(jax.nn.softplus(wrong))) / 2


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage `reward_motion`. `init` may name `flash_vae`."""

    def data(painter: Painter) -> dict:
        def clips(count, change=None):
            return talking_clips(config, painter, "train", seed, count, settings.latent_frames, part=FACE, change=change)

        true = clips(settings.clips)
        told = true.states.reshape(-1, READINGS)
        scale = {"mean": told.mean(axis=0), "std": told.std(axis=0) + 1e-3}
        return {"true": true, "shaky": clips(max(1, settings.clips // 2), shaken), "scale": scale}

    def loss(model: MotionReward, data: dict, key: Array) -> tuple[Array, dict]:
        k_true, k_shaky, k_wrong, k_level, k_noise = jax.random.split(key, 5)

        def windows(clips: TalkingClips, key: Array) -> Window:
            k_index, k_offset = jax.random.split(key)
            index = jax.random.randint(k_index, (settings.batch,), 0, clips.video.shape[0])
            offset = jax.random.randint(k_offset, (settings.batch,), 0, clips.video.shape[1] - FRAMES + 1)
            return window_of(clips, index, offset, FRAMES)

        both = (windows(data["true"], k_true), windows(data["shaky"], k_shaky))
        seen = split_batch(jax.tree.map(lambda *parts: jnp.concatenate(parts), *both))
        level = jax.random.uniform(k_level, (2 * settings.batch, 1, 1, 1, 1), maxval=settings.noise)
        read = model.read(seen.video + level * grain(k_noise, seen.video.shape))
        told = jnp.mean((read - (seen.states - data["scale"]["mean"]) / data["scale"]["std"]) ** 2)
        true, shaky = jnp.split(read, 2)
        wrong = jax.vmap(wrong_motions)(jax.random.split(k_wrong, settings.batch), true) | {"shaky": shaky}
        judged = model.logits(jnp.concatenate([true, *(wrong[name] for name in WRONG)])).mean(axis=-1)
        own, *others = jnp.split(judged, 1 + len(WRONG))
        parts = {name: two_sided(own, logits) for name, logits in zip(WRONG, others, strict=True)}
        return sum(parts.values()) / len(parts) + settings.told * told, parts | {"told": told}

    def judge(held_out: HeldOut) -> Callable[[Params], Figures]:
        true = held_out.clips
        made = jax.vmap(wrong_motions)(jax.random.split(jax.random.key(0), settings.held_out), true.video)
        wrong = {name: dataclasses.replace(true, video=np.asarray(video)) for name, video in made.items()}
        wrong["shaky"] = talking_clips(
            config, held_out.painter, "held_out", seed + _HELD_OUT_SEED, settings.held_out, LATENT_FRAMES, change=shaken
        )
        score = jax.jit(lambda params, clips: each_clip(held_out.model.bind(params).raw, clips.shown()))

        def figures(params: Params) -> Figures:
            scores = {name: np.asarray(score(params, wrong[name])) for name in WRONG}
            return motion_figures(np.asarray(score(params, true)), scores)

        return figures

    return reward_stage("motion", config, seed, init, settings, data=data, loss=loss, judge=judge)


def motion_figures(true: Float[np.ndarray, " n"], wrong: dict[str, Float[np.ndarray, " n"]]) -> Figures:
    """Shares of true clips that score higher than the wrong one made of them (shaky: than one of another person), and their mean."""
    accuracy = {f"accuracy_{name}": share_above(true, scores) for name, scores in wrong.items()}
    loss = np.mean([two_sided(jnp.asarray(true), jnp.asarray(scores)) for scores in wrong.values()])
    return {"loss": float(loss), "accuracy": float(np.mean(list(accuracy.values())))} | accuracy
