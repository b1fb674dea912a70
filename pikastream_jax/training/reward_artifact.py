"""The reward for clean pictures: regresses how strongly a clip was damaged, and ranks two strengths of the same damage.

Every row of a batch is a true clip three times: as it is, and with the same damage at two strengths. The ranking (RankIQA, Liu et al. 2017) makes
small differences count that the regression would round off.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import spearmanr

from pikastream_jax.config import Config
from pikastream_jax.nn.layers import Params
from pikastream_jax.rewards import Shown
from pikastream_jax.rewards.artifact import ArtifactReward
from pikastream_jax.training.damage import DAMAGES, damage
from pikastream_jax.training.loop import Stage
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.reward_clips import Painter, pixels, talking_clips
from pikastream_jax.training.reward_stage import Figures, HeldOut, RewardSettings, each_clip, reward_stage, share_above
from pikastream_jax.training.settings import Optimiser

SMALL = 0.1  # strength that is to be told from a clean picture
_FRAMES = 4  # video frames of a clip that is damaged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(RewardSettings):
    """Settings of the stage; a row of a batch is a clip of 4 video frames, clean and with two strengths of one damage."""

    updates: int = 500
    batch: int = 8
    optimiser: Optimiser = OptimiserConfig(learning_rate=2e-3, warmup_steps=30, weight_decay=0.01)
    clips: int = 384
    """True clips of one latent frame that are drawn once at the start."""
    ranking: float = 0.2
    """Weight of the ranking beside the regression's 1."""


def strength_error(said: Float[Array, "*b"], true: Float[Array, "*b"]) -> Float[Array, ""]:
    """Absolute error, smooth within 0.02."""
    error = said - true
    return jnp.mean(jnp.sqrt(error * error + 4e-4) - 0.02)


def ranking_error(weaker: Float[Array, "*b"], stronger: Float[Array, "*b"]) -> Float[Array, ""]:
    """Logistic loss of the difference in units of 0.05: what is more strongly damaged must be said to be."""
    return jnp.mean(jax.nn.softplus((weaker - stronger) / 0.05))


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage `reward_artifact`. `init` may name `flash_vae`."""

    def data(painter: Painter) -> dict:
        return {"clips": talking_clips(config, painter, "train", seed, settings.clips, 1)}

    def loss(model: ArtifactReward, data: dict, key: Array) -> tuple[Array, dict]:
        k_index, k_frame, k_kind, k_strength, k_damage = jax.random.split(key, 5)
        index = jax.random.randint(k_index, (settings.batch,), 0, settings.clips)
        kind = jax.random.randint(k_kind, (settings.batch,), 0, len(DAMAGES))
        # Squared: most damage is small.
        strength = jnp.sort(jax.random.uniform(k_strength, (settings.batch, 2)) ** 2, axis=-1)

        def one(args):
            index, kind, strength, key = args
            video = pixels(data["clips"].video[index])
            return jnp.stack([video, *(damage(key, kind, s, video) for s in strength)])

        seen = jax.lax.map(one, (index, kind, strength, jax.random.split(k_damage, settings.batch)))
        last = jax.random.randint(k_frame, (), 1, _FRAMES)
        before, frame = (jax.lax.dynamic_index_in_dim(seen, last - back, axis=2, keepdims=False) for back in (1, 0))
        reference = jnp.broadcast_to(pixels(data["clips"].reference[index])[:, None], frame.shape)
        before, frame, reference = split_batch((before, frame, reference))
        said = model.strength(*(x.reshape(-1, *x.shape[2:]) for x in (before, frame, reference))).reshape(settings.batch, 3)
        true = jnp.concatenate([jnp.zeros((settings.batch, 1)), strength], axis=-1)
        parts = {"strength": strength_error(said, true), "ranking": ranking_error(said[:, :-1], said[:, 1:])}
        return parts["strength"] + settings.ranking * parts["ranking"], parts

    def judge(held_out: HeldOut) -> Callable[[Params], Figures]:
        shown = jax.tree.map(lambda leaf: leaf[: max(2, settings.held_out // 2)], held_out.clips.shown())
        shown = dataclasses.replace(shown, video=shown.video[:, :_FRAMES], mel=shown.mel[:, :1])
        strength = np.random.default_rng(0).uniform(0, 1, (len(DAMAGES), len(shown.video))).astype(np.float32)

        @jax.jit
        def score(params, kind, strength):
            def one(args):
                key, strength, video = args
                return damage(key, kind, strength, video)

            video = jax.lax.map(one, (jax.random.split(jax.random.key(0), len(shown.video)), strength, shown.video))
            return each_clip(held_out.model.bind(params).raw, Shown(video, shown.reference, shown.mel))

        def figures(params: Params) -> Figures:
            clean = np.asarray(score(params, 0, np.zeros_like(strength[0])))
            small = np.stack([score(params, kind, np.full_like(strength[0], SMALL)) for kind in range(len(DAMAGES))])
            damaged = np.stack([score(params, kind, strength[kind]) for kind in range(len(DAMAGES))])
            return artifact_figures(clean, small, damaged, strength)

        return figures

    return reward_stage("artifact", config, seed, init, settings, data=data, loss=loss, judge=judge)


def artifact_figures(
    clean: Float[np.ndarray, " n"], small: Float[np.ndarray, "k n"], damaged: Float[np.ndarray, "k n"], strength: Float[np.ndarray, "k n"]
) -> Figures:
    """Rank correlation of minus the score with the strength, over all kinds, and accuracy against a clean clip at strength `SMALL`."""
    accuracy = {f"accuracy_{name}": share_above(clean, scores) for name, scores in zip(DAMAGES, small, strict=True)}
    return {
        "loss": float(strength_error(jnp.asarray(-damaged), jnp.asarray(strength))),
        "rank_correlation": float(spearmanr(-damaged.ravel(), strength.ravel()).statistic),
        "accuracy": float(np.mean(list(accuracy.values()))),
        **accuracy,
    }
