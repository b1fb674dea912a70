"""All rewards at once: scores of shown clips, and the gradient that raises them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.nn.layers import Functional, Params, functional
from pikastream_jax.rewards.artifact import ArtifactReward
from pikastream_jax.rewards.identity import IdentityReward
from pikastream_jax.rewards.lip_sync import LipSyncReward
from pikastream_jax.rewards.motion import MotionReward
from pikastream_jax.rewards.shown import Shown

REWARDS = ("identity", "lip_sync", "motion", "artifact")


def reward_model(config: Config, name: str, *, rngs: nnx.Rngs) -> nnx.Module:
    """The model of one reward. Of the preset only the bands of the sound matter.

    Raises:
      ValueError: no reward has that name.
    """
    if name == "identity":
        return IdentityReward(rngs=rngs)
    if name == "lip_sync":
        return LipSyncReward(config.audio.mels, rngs=rngs)
    if name == "motion":
        return MotionReward(rngs=rngs)
    if name == "artifact":
        return ArtifactReward(rngs=rngs)
    raise ValueError(f"no reward is called {name!r}; choose one of {', '.join(REWARDS)}")


@dataclasses.dataclass(frozen=True)
class Rewards:
    """The reward models as functions of their parameters, which are a dict by reward."""

    models: dict[str, Functional]

    @classmethod
    def of(cls, config: Config) -> "Rewards":
        """All rewards of a preset."""
        return cls({name: functional(lambda rngs, name=name: reward_model(config, name, rngs=rngs)) for name in REWARDS})

    def scores(self, params: dict[str, Params], shown: Shown) -> dict[str, Float[Array, " b"]]:
        """Every reward of every clip, zero mean and unit variance over true clips; higher is better.

        Raises:
          ValueError: the shapes of `shown` do not belong together, or the clips are too short.
        """
        shown.check()
        return {name: model.bind(params[name])(shown) for name, model in self.models.items()}

    def gradient(
        self, params: dict[str, Params], shown: Shown, weights: dict[str, float], clip: float
    ) -> tuple[dict[str, Float[Array, " b"]], Float[Array, "b t 128 128 3"]]:
        """Scores, and the direction in which to change the video.

        Each reward's gradient with respect to a clip is first scaled down to the length `clip` where it is longer, so that no reward and no clip
        drowns the others; it fades as the clip scores what true clips score (`worth`); then they are summed with their weights. ReFL (Xu et al. 2023, https://arxiv.org/abs/2304.05977) minimises
        `-sum(stop_gradient(cotangent) * video)`, whose gradient is minus this direction.

        Args:
          weights: of the rewards to climb; the others are only scored.
          clip: largest L2 norm of one reward's gradient over one clip.

        Raises:
          ValueError: as `scores`; a weight of an unknown reward; `clip` not above 0.
        """
        shown.check()
        if unknown := sorted(weights.keys() - self.models.keys()):
            raise ValueError(f"no reward is called {', '.join(unknown)}; choose of {', '.join(self.models)}")
        if not clip > 0:
            raise ValueError(f"clip {clip} must be above 0: it is the largest norm of a reward's gradient")
        scores, total = {}, jnp.zeros(shown.video.shape, jnp.float32)
        for name, model in self.models.items():

            def score(video, model=model, name=name):
                return model.bind(params[name])(dataclasses.replace(shown, video=video))

            if name not in weights:
                scores[name] = score(shown.video)
                continue
            scores[name], pull = jax.vjp(score, shown.video)
            (gradient,) = pull(jnp.ones_like(scores[name]))
            fade = jax.vmap(jax.grad(worth))(scores[name])
            total = total + weights[name] * fade[:, None, None, None, None] * clip_each(gradient.astype(jnp.float32), clip)
        return scores, total


def worth(score: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """What a score counts for where rewards are climbed: itself up to 0, the mean of true clips, then less and less, and from 1 on no more.

    A clip that a reward finds better than true clips has found the reward's weakness: climbed without an end, the reward of artifacts was
    answered with a chequered pattern over the whole picture (docs/rewards.md).
    """
    above = jnp.clip(score, 0.0, 1.0)
    return jnp.minimum(score, 1.0) - 0.5 * above**2


def clip_each(gradient: Float[Array, "b ..."], clip: float) -> Float[Array, "b ..."]:
    """Every row scaled down to an L2 norm of `clip` where it is longer."""
    norm = jnp.sqrt(jnp.sum(gradient * gradient, axis=tuple(range(1, gradient.ndim)), keepdims=True))
    return gradient * jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
