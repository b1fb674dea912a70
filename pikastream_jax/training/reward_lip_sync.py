"""The reward for lip sync: embeddings of mouth and sound that agree where both are of the same moment.

InfoNCE over the windows of a batch: every window's picture picks its own sound among that of other moments of the clip, the nearest two video frames
away, and of other clips; and the other way round. SyncNet's pairs, with all negatives of a batch at once.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.data.corpus import MEL_FRAMES, VIDEO_FRAMES, augment
from pikastream_jax.nn.layers import Params
from pikastream_jax.rewards.lip_sync import MOUTH, STEP, LipSyncReward, confidence
from pikastream_jax.training.loop import Stage
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.reward_clips import Painter, check_latent_frames, grain, talking_clips, window_of
from pikastream_jax.training.reward_stage import Figures, HeldOut, RewardSettings, reward_stage, share_above
from pikastream_jax.training.settings import Optimiser

FRAMES = 20  # video frames of a training window: 7 windows of the network
_MISS = 3  # pixels by which a training window may lie beside `MOUTH`
_SHARPNESS = 14.0  # of the softmax over cosines
_SPEAKING = 0.5  # activity from which on a clip is one of speech


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(RewardSettings):
    """Settings of the stage; a row of a batch is a stretch of a clip."""

    updates: int = 300
    batch: int = 16
    optimiser: Optimiser = OptimiserConfig(learning_rate=2e-3, warmup_steps=30, weight_decay=0.01)
    clips: int = 128
    """True clips that are drawn once at the start."""
    latent_frames: int = 9
    """Length of those clips."""
    noise: float = 0.03
    """Largest standard deviation of the noise on pictures."""

    def __post_init__(self):
        super().__post_init__()
        check_latent_frames(self.latent_frames, FRAMES)


def contrast(lips: Float[Array, "b w d"], sound: Float[Array, "b w d"], sharpness: float = _SHARPNESS) -> Float[Array, ""]:
    """Cross entropy of picking the own sound among all windows' sounds, and the own lips among all windows' lips; mean of both."""
    lips, sound = (x.reshape(-1, x.shape[-1]) for x in (lips, sound))
    logits = sharpness * lips @ sound.T
    own = jnp.diagonal(logits)
    return jnp.mean(jax.nn.logsumexp(logits, axis=0) + jax.nn.logsumexp(logits, axis=1) - 2 * own) / 2


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage `reward_lip_sync`. `init` may name `flash_vae`."""
    around = tuple(slice(side.start - _MISS, side.stop + _MISS) for side in MOUTH)
    height, width = (side.stop - side.start for side in MOUTH)

    def data(painter: Painter) -> dict:
        return {"clips": talking_clips(config, painter, "train", seed, settings.clips, settings.latent_frames, part=around)}

    def loss(model: LipSyncReward, data: dict, key: Array) -> tuple[Array, dict]:
        k_index, k_offset, k_place, k_level, k_noise, k_sound = jax.random.split(key, 6)
        count, length = data["clips"].video.shape[:2]
        index = jax.random.randint(k_index, (settings.batch,), 0, count)
        offset = jax.random.randint(k_offset, (settings.batch,), 0, length - FRAMES + 1)
        window = split_batch(window_of(data["clips"], index, offset, FRAMES))
        video, mel = window.video, window.sound
        place = jax.random.randint(k_place, (settings.batch, 2), 0, 2 * _MISS + 1)
        video = jax.vmap(lambda v, p: jax.lax.dynamic_slice(v, (0, p[0], p[1], 0), (FRAMES, height, width, 3)))(video, place)
        level = jax.random.uniform(k_level, (settings.batch, 1, 1, 1, 1), maxval=settings.noise)
        video = video + level * grain(k_noise, video.shape)
        mel = jax.vmap(lambda m, k: augment(m, k, config.audio))(mel, jax.random.split(k_sound, settings.batch))
        mel = mel.reshape(settings.batch, FRAMES // VIDEO_FRAMES, MEL_FRAMES, -1)
        lips, sound = model.embed_mouths(video), model.embed_sound(mel)
        one_by_one = jnp.mean(jax.vmap(lambda l, s: contrast(l[None], s[None]))(lips, sound))  # noqa: E741
        parts = {"moments": one_by_one, "batch": contrast(lips, sound)}
        return parts["moments"] + parts["batch"], parts

    def judge(held_out: HeldOut) -> Callable[[Params], Figures]:
        clips = held_out.clips

        @jax.jit
        def embed(params, clips):
            """Lips, and the sound of their moments, of moments before and after, and of another clip: all that scores are made of."""
            model, right = held_out.model.bind(params), clips.shown()
            lips = jax.lax.map(lambda video: model.embed_lips(video[None])[0], right.video)
            sounds = {shift: model.embed_sound(clips.shown(shift).mel) for shift in (-STEP, 0, STEP)}
            return lips, sounds, jnp.roll(sounds[0], 1, axis=0)

        def figures(params: Params) -> Figures:
            lips, sounds, others = embed(params, clips)
            scores = {shift: np.asarray(confidence(lips, sound)) for shift, sound in sounds.items()}
            return {
                "loss": float(contrast(lips, sounds[0])),
                **sync_figures(scores, np.asarray(confidence(lips, others)), np.asarray(clips.activity)),
                "accuracy_window": moment_accuracy(np.asarray(lips), np.asarray(sounds[0])),
            }

        return figures

    return reward_stage("lip_sync", config, seed, init, settings, data=data, loss=loss, judge=judge)


def sync_figures(scores: dict[int, Float[np.ndarray, " n"]], others: Float[np.ndarray, " n"], activity: Float[np.ndarray, " n"]) -> Figures:
    """Shares of clips that score higher with their own sound than with it two video frames early or late, and than with another clip's."""
    speaking = activity > _SPEAKING
    shifted = [values for shift, values in scores.items() if shift]

    def accuracy(rows) -> float:
        return float(np.mean([share_above(scores[0][rows], values[rows]) for values in shifted])) if rows.any() else 0.5

    return {
        "accuracy_shift": accuracy(np.ones_like(speaking)),
        "accuracy_shift_speaking": accuracy(speaking),
        "accuracy_other_speech": share_above(scores[0], others),
    }


def moment_accuracy(lips: Float[np.ndarray, "n w d"], sound: Float[np.ndarray, "n w d"]) -> float:
    """Share of single windows whose own sound is nearer than that of the window before, and of the one after."""
    cosine = np.einsum("nwd,nvd->nwv", lips, sound)
    own = np.einsum("nww->nw", cosine)
    before, after = (np.diagonal(cosine, offset, axis1=1, axis2=2) for offset in (-1, 1))
    return (share_above(own[:, 1:], before) + share_above(own[:, :-1], after)) / 2

