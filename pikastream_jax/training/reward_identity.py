"""The reward for likeness: tells the person of the reference from the same person with one attribute changed.

A contrastive loss (InfoNCE, van den Oord et al. 2018, https://arxiv.org/abs/1807.03748): the reference picks its own person's other picture out of a
batch of people and of their hard negatives. Beside it the first features of the embedding learn the parameters that the renderer was told of the
face, as recognisers learn from many people's names, and how they change with the attribute.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from scipy.stats import rankdata

from pikastream_jax.config import Config
from pikastream_jax.data.face import FaceState, Identity, sample_identity
from pikastream_jax.data.face_attributes import ATTRIBUTES, attribute_values, change_attribute
from pikastream_jax.nn.layers import Params
from pikastream_jax.rewards.identity import DIM, IdentityReward
from pikastream_jax.training.clips import reference_state
from pikastream_jax.training.faces import random_states
from pikastream_jax.training.loop import Stage
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.reward_clips import Painter, grain, in_parts, pixels
from pikastream_jax.training.reward_stage import Figures, HeldOut, RewardSettings, reward_stage, share_above
from pikastream_jax.training.settings import Optimiser

_HELD_OUT_SEED = 2_000_003
_SHARPNESS = 20.0  # of the softmax over cosines
# A change that moves fewer pixels than this share by more than a tenth of the range cannot be seen: a bald head's hair color.
_VISIBLE = 0.002
_TOLD = 64  # people of one call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(RewardSettings):
    """Settings of the stage; a row of a batch is a person with a reference, another picture and a hard negative."""

    updates: int = 800
    batch: int = 16
    optimiser: Optimiser = OptimiserConfig(learning_rate=3e-3, warmup_steps=30, weight_decay=0.05)
    people: int = 2_048
    """People that are drawn once at the start."""
    noise: float = 0.03
    """Largest standard deviation of the noise on pictures: gradients of a score that minds noise are noise."""
    miss: int = 2
    """Pixels by which a picture may lie beside its place, each way: where a nose is is no proof of whose it is."""
    told: float = 1.0
    """Weight of the errors in the face's parameters and in their change, beside the contrast's 1."""

    def __post_init__(self):
        super().__post_init__()
        if self.people < self.batch:
            raise ValueError(f"people {self.people} must be at least the batch, {self.batch}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class People:
    """n people, three pictures each: the reference, another one, and the latter with one attribute changed."""

    pictures: UInt8[Array, "n 3 128 128 3"]
    values: Float[Array, "n 3 o"]  # `attribute_values` of the person in each picture
    attribute: Int[Array, " n"]  # the changed one, in the order of ATTRIBUTES


def draw_people(painter: Painter, seed: int, count: int) -> People:
    """Random people; every attribute is changed equally often."""
    attribute = np.arange(count) % len(ATTRIBUTES)

    keys = jax.random.key_data(jax.random.split(jax.random.key(seed), count))
    people, states, values = in_parts(lambda rows: _told(*rows), (keys, attribute), _TOLD)
    people, states = (jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree) for tree in (people, states))
    pictures = painter.stills(people, states)
    return People(pictures.reshape(count, 3, *pictures.shape[1:]), values, attribute)


@jax.jit
@jax.vmap
def _told(key: Array, attribute: Array) -> tuple[Identity, FaceState, Array]:
    """Who is in a person's three pictures, what they do there, and what the renderer is told of the face."""
    k_identity, k_change, k_reference, k_state = jax.random.split(jax.random.wrap_key_data(key), 4)
    identity = sample_identity(k_identity)
    state = jax.tree.map(lambda leaf: leaf[0], random_states(k_state, 1))
    # FlashVAE's faces turn farther than people who talk do.
    state = dataclasses.replace(state, **{name: 0.5 * getattr(state, name) for name in ("yaw", "pitch", "roll", "blink")})
    people = (identity, identity, change_attribute(k_change, identity, attribute))
    states = (reference_state(k_reference), state, state)
    people, states = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *three) for three in (people, states))
    return people, states, jax.vmap(attribute_values)(people)


def contrast(
    reference: Float[Array, "b d"], same: Float[Array, "b d"], other: Float[Array, "b d"], sharpness: float = _SHARPNESS
) -> Float[Array, ""]:
    """Cross entropy of picking the person's own second picture among everybody's second pictures and hard negatives."""
    cosines = reference @ jnp.concatenate([same, other]).T
    own = jnp.sum(reference * same, axis=-1)
    return jnp.mean(jax.nn.logsumexp(sharpness * cosines, axis=-1) - sharpness * own)


def told_error(said: Float[Array, "*b o"], true: Float[Array, "*b o"]) -> Float[Array, ""]:
    """Squared near zero, absolute beyond: what glasses or hair hide cannot be read."""
    error = said - true
    return jnp.mean(jnp.sqrt(error * error + 0.01) - 0.1)


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage `reward_identity`. `init` may name `flash_vae`."""
    def data(painter: Painter) -> dict:
        people = draw_people(painter, seed, settings.people)
        if people.values.shape[-1] > DIM:
            raise ValueError(f"{people.values.shape[-1]} parameters of a face do not fit an embedding of {DIM}")
        every = people.values[:, 0]
        return {"people": people, "mean": every.mean(0), "std": every.std(0) + 1e-3}

    def loss(model: IdentityReward, data: dict, key: Array) -> tuple[Array, dict]:
        k_index, k_level, k_noise, k_place = jax.random.split(key, 4)
        index = jax.random.choice(k_index, settings.people, (settings.batch,), replace=False)
        people = split_batch(jax.tree.map(lambda leaf: leaf[index], data["people"]))
        place = jax.random.randint(k_place, (settings.batch, 3, 2), -settings.miss, settings.miss + 1)
        seen = jax.vmap(jax.vmap(lambda picture, by: jnp.roll(picture, by, axis=(0, 1))))(pixels(people.pictures), place)
        level = jax.random.uniform(k_level, (settings.batch, 3, 1, 1, 1), maxval=settings.noise)
        seen = seen + level * grain(k_noise, seen.shape)
        features = model.features(seen.reshape(-1, *seen.shape[2:])).reshape(settings.batch, 3, -1)
        true = (people.values - data["mean"]) / data["std"]
        said = features[..., : true.shape[-1]]
        parts = {
            "contrast": contrast(*jnp.moveaxis(model.compared(features), 1, 0)),
            "told": told_error(said, true),
            # The two pictures of one state differ in one attribute: what the state does to the readings cancels.
            "change": told_error(said[:, 2] - said[:, 1], true[:, 2] - true[:, 1]),
        }
        return parts["contrast"] + settings.told * (parts["told"] + parts["change"]), parts

    def judge(held_out: HeldOut) -> Callable[[Params], Figures]:
        people = draw_people(held_out.painter, seed + _HELD_OUT_SEED, 8 * settings.held_out)

        @jax.jit
        def embed(params, pictures):
            return jax.lax.map(lambda three: held_out.model.bind(params).embed(pixels(three)), pictures)

        def figures(params: Params) -> Figures:
            vectors = np.asarray(embed(params, people.pictures))
            return identity_figures(*np.moveaxis(vectors, 1, 0), people)

        return figures

    return reward_stage("identity", config, seed, init, settings, data=data, loss=loss, judge=judge)


def visible(people: People) -> np.ndarray:
    """Which people's changed attribute can be seen, [n] bool."""
    change = np.abs(people.pictures[:, 1].astype(np.int16) - people.pictures[:, 2]).max(axis=-1)
    return (change > 255 / 10).mean(axis=(1, 2)) > _VISIBLE


def identity_figures(
    reference: Float[np.ndarray, "n d"], same: Float[np.ndarray, "n d"], other: Float[np.ndarray, "n d"], people: People
) -> Figures:
    """Accuracy on hard negatives that can be seen (mean over attributes, and by attribute), with the person's own state; and `verification`: the
    probability that any true pair is closer than any visible hard negative, of other people in other states (area under the ROC curve).
    """
    own, wrong, seen = (reference * same).sum(-1), (reference * other).sum(-1), visible(people)
    figures = {}
    for number, name in enumerate(ATTRIBUTES):
        rows = seen & (people.attribute == number)
        if rows.any():
            figures[f"accuracy_{name}"] = share_above(own[rows], wrong[rows])
    ranks = rankdata(np.concatenate([own, wrong[seen]]))[: len(own)]
    area = (ranks.sum() - len(own) * (len(own) + 1) / 2) / (len(own) * max(1, seen.sum()))
    logits = _SHARPNESS * np.concatenate([reference @ same.T, wrong[:, None]], axis=1)
    loss = np.mean(np.log(np.exp(logits - logits.max()).sum(-1)) + logits.max() - _SHARPNESS * own)
    return {"loss": float(loss), "accuracy": float(np.mean(list(figures.values()))), "verification": float(area)} | figures
