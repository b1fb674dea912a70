"""Reward feedback learning (ReFL, Xu et al. 2023, https://arxiv.org/abs/2304.05977): from latents to pixels, rewards and a loss.

FlashVAE decodes as in a stream, latent frame by latent frame with its rolling cache. In training every latent frame is decoded a second
time when its gradient is taken, so that memory holds one frame's activations and not the clip's.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.flash_vae import FlashVAE, KVCache
from pikastream_jax.flash_vae.latents import LatentStatistics
from pikastream_jax.nn.layers import Params
from pikastream_jax.rewards import REWARDS, Rewards, Shown, canonical
from pikastream_jax.rewards.scoring import worth
from pikastream_jax.rewards.shown import MEL_PER_LATENT
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.settings import RemindedSettings
from pikastream_jax.weights.safetensors_io import restore_into


@dataclasses.dataclass(frozen=True)
class RewardWeights:
    """How much of each reward's gradient counts; 0 leaves it out, and it is still scored."""

    identity: float = 1.0
    lip_sync: float = 1.0
    motion: float = 1.0
    artifact: float = 1.0

    def __post_init__(self):
        for name, weight in dataclasses.asdict(self).items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight {weight} of reward {name} must be finite and at least 0")
        if not self.used():
            raise ValueError("all rewards have weight 0: there is nothing to climb, give one of them a weight")

    def used(self) -> dict[str, float]:
        """The weights above 0."""
        return {name: getattr(self, name) for name in REWARDS if getattr(self, name)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardedSettings(RemindedSettings):
    """What the stages that climb rewards have in common."""

    weights: RewardWeights = RewardWeights()
    clip: float = 0.1
    """Largest norm of one reward's gradient over the pixels of one row."""
    anchor: float = 1.0
    """Weight of the squared distance from the velocities of the model that the stage starts from."""
    data: float = 2.5  # on `nano`'s first 8 batches its gradient is then as long as the rewards': theirs are 2.4 times it (teacher) and 2.2 (student)

    def __post_init__(self):
        super().__post_init__()
        if not self.clip > 0:
            raise ValueError(f"clip {self.clip} must be above 0: it is the largest norm of a reward's gradient")
        if not self.anchor >= 0:
            raise ValueError(f"anchor {self.anchor} must be at least 0")


def load_rewards(config: Config, init: dict[str, Path]) -> tuple[Rewards, dict[str, Params]]:
    """The trained rewards.

    Args:
      init: run folder or .safetensors of `reward_identity`, `reward_lip_sync`, `reward_motion` and `reward_artifact`; more names are left alone.

    Raises:
      ValueError: one is missing, or does not fit its model.
    """
    rewards, params = Rewards.of(config), {}
    for name, model in rewards.models.items():
        stage = f"reward_{name}"
        if stage not in init:
            raise ValueError(f"the rewards need --init {stage}=PATH: train it with `python train.py {stage}`")
        try:
            params[name] = restore_into(model.abstract, load_weights(init[stage]))
        except ValueError as error:
            raise ValueError(f"--init {stage}={init[stage]}: {error}") from error
    return rewards, params


def decode_frames(
    vae: FlashVAE, statistics: LatentStatistics, cache: KVCache, latents: Float[Array, "b f r c z"]
) -> tuple[KVCache, Float[Array, "b t h w 3"]]:
    """Normalised latents to pixels, one latent frame after another; gradients decode each frame anew."""

    @jax.checkpoint
    def step(cache, latent):
        return vae.decode_step(cache, statistics.restore(latent))

    cache, frames = jax.lax.scan(step, cache, latents.swapaxes(0, 1))
    frames = frames.swapaxes(0, 1)
    return cache, frames.reshape(frames.shape[0], -1, *frames.shape[3:])


def decode_from(vae: FlashVAE, statistics: LatentStatistics, before: Float[Array, "b p r c z"], latents: Float[Array, "b f r c z"]) -> Float[Array, "b t h w 3"]:
    """Pixels of latent frames that come after others: those only fill the cache, without gradient."""
    cache = vae.init_decode_cache(latents.shape[0], *latents.shape[2:4])
    if before.shape[1]:
        cache, _ = decode_frames(vae, statistics, cache, before)
    return decode_frames(vae, statistics, jax.lax.stop_gradient(cache), latents)[1]


def reference_picture(vae: FlashVAE, statistics: LatentStatistics, reference: Float[Array, "b r c z"]) -> Float[Array, "b h w 3"]:
    """The picture that a reference's latents stand for: the last of its equal video frames."""
    nothing = jnp.zeros((reference.shape[0], 0, *reference.shape[1:]))
    return decode_from(vae, statistics, nothing, reference[:, None])[:, -1]


def as_shown(pixels: Float[Array, "b t h w 3"], reference: Float[Array, "b h w 3"], mel: Float[Array, "b f m k"]) -> Shown:
    """What a reward looks at: pixels as a viewer gets them, for whom black and white are the ends, so that nothing is won beyond.

    Args:
      mel: every latent frame's whole slice.
    """
    video, picture = (canonical(jnp.clip(seen, -1.0, 1.0)) for seen in (pixels, reference))
    return Shown(video, jax.lax.stop_gradient(picture), mel[:, :, -MEL_PER_LATENT:])


def reward_loss(
    rewards: Rewards, params: dict[str, Params], shown: Shown, weights: RewardWeights, clip: float
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """ReFL's surrogate, whose gradient by the video is minus the clipped and weighted sum of the rewards', a row's share of it; and what `score_metrics` says.

    Args:
      clip: largest norm of one reward's gradient over one row.
    """
    still = dataclasses.replace(shown, video=jax.lax.stop_gradient(shown.video))
    scores, direction = rewards.gradient(params, still, weights.used(), clip)
    loss = -jnp.sum(jax.lax.stop_gradient(direction) * shown.video) / shown.video.shape[0]
    return loss, score_metrics(scores, weights)


def score_metrics(scores: dict[str, Float[Array, " b"]], weights: RewardWeights) -> dict[str, Float[Array, ""]]:
    """Mean scores; and as `worth` the weighted sum of what they are worth, which is what the stages with rewards raise."""
    total = sum(weight * jnp.mean(worth(scores[name])) for name, weight in weights.used().items())
    return {name: jnp.mean(score) for name, score in scores.items()} | {"worth": total}
