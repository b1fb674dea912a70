"""All rewards at once: their gradients are clipped one by one and weighted, their scores calibrated; bad input is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pikastream_jax.nn.layers import functional, parameter_count
from pikastream_jax.rewards import REWARDS, Rewards, Shown
from pikastream_jax.rewards.network import Calibration
from pikastream_jax.rewards.scoring import worth
from pikastream_jax.training.refl import load_rewards
from pikastream_jax.weights import safetensors_io
from tests.small import randomised, small_config

CONFIG = small_config()


def shown_clips(clips=2, frames=12, seed=0):
    k = jax.random.split(jax.random.key(seed), 3)
    return Shown(
        jax.random.uniform(k[0], (clips, frames, 128, 128, 3), minval=-1),
        jax.random.uniform(k[1], (clips, 128, 128, 3), minval=-1),
        jax.random.normal(k[2], (clips, frames // 4, 16, CONFIG.audio.mels)),
    )


class Linear(nnx.Module):
    """A reward whose gradient is known: `slope` on the first pixel of each clip, the same for all clips but scaled by its reference."""

    def __init__(self, slope: float):
        self.slope = nnx.Param(jnp.asarray(slope))

    def __call__(self, shown):
        return self.slope[...] * shown.reference[:, 0, 0, 0] * shown.video[:, 0, 0, 0, 0]


def test_gradients_are_clipped_one_by_one_and_weighted():
    """By hand. Clip 0: rewards' slopes 3 and -0.5, times its reference 2: 6, clipped to 1.5, and -1. Clip 1: times 0.1: 0.3 and -0.05.

    Pixels of -0.6 and 0.5: the steep scores are -3.6 and 0.15, the flat ones 0.6 and -0.025, and what is above 0 fades by as much.
    """
    shown = shown_clips()
    shown = dataclasses.replace(shown, video=shown.video.at[:, 0, 0, 0, 0].set(jnp.array([-0.6, 0.5])))
    shown = dataclasses.replace(shown, reference=shown.reference.at[:, 0, 0, 0].set(jnp.array([2.0, 0.1])))
    rewards = Rewards({"steep": functional(lambda rngs: Linear(3.0)), "flat": functional(lambda rngs: Linear(-0.5))})
    params = {"steep": {"slope": jnp.asarray(3.0)}, "flat": {"slope": jnp.asarray(-0.5)}}
    scores, cotangent = rewards.gradient(params, shown, {"steep": 1.0, "flat": 2.0}, clip=1.5)
    pixel = np.asarray(shown.video[:, 0, 0, 0, 0])
    np.testing.assert_allclose(scores["steep"], [6.0 * pixel[0], 0.3 * pixel[1]], rtol=1e-5)
    np.testing.assert_allclose(cotangent[:, 0, 0, 0, 0], [1.5 + 2 * 0.4 * -1.0, 0.85 * 0.3 + 2 * -0.05], rtol=1e-5)
    assert float(jnp.abs(cotangent).sum()) == pytest.approx(0.7 + 0.155, rel=1e-5), "and no other pixel is asked to change"

    scored, only_flat = rewards.gradient(params, shown, {"flat": 1.0}, clip=1.5)
    assert scored.keys() == {"steep", "flat"}
    np.testing.assert_allclose(only_flat[:, 0, 0, 0, 0], [0.4 * -1.0, -0.05], rtol=1e-5)
    # ReFL's loss moves the video along the cotangent.
    loss = jax.grad(lambda video: -jnp.sum(jax.lax.stop_gradient(cotangent) * video))(shown.video)
    np.testing.assert_allclose(loss, -cotangent)


@pytest.fixture(scope="module")
def real():
    rewards = Rewards.of(CONFIG)
    return rewards, {name: randomised(model.abstract, index) for index, (name, model) in enumerate(rewards.models.items())}


def test_every_reward_scores_and_can_be_climbed(real):
    rewards, params = real
    counts = {name: parameter_count(model.abstract) for name, model in rewards.models.items()}
    assert all(100_000 < count < 700_000 for count in counts.values()), counts
    shown = shown_clips()
    climb = jax.jit(lambda params, shown: rewards.gradient(params, shown, dict.fromkeys(REWARDS, 1.0), 1e6))
    scores, cotangent = climb(params, shown)
    assert scores.keys() == set(REWARDS) and all(score.shape == (2,) for score in scores.values())
    assert cotangent.shape == shown.video.shape and jnp.isfinite(cotangent).all()
    length = 0.1 / jnp.sqrt(jnp.sum(cotangent**2))
    higher, _ = climb(params, dataclasses.replace(shown, video=shown.video + length * cotangent))
    assert sum(map(worth, higher.values())).sum() > sum(map(worth, scores.values())).sum()


@settings(deadline=None)
@given(st.floats(-5, 5), st.floats(0, 2))
def test_a_score_is_worth_itself_until_it_is_that_of_true_clips(score, more):
    value, slope = jax.value_and_grad(worth)(score)
    assert worth(score + more) >= value - 1e-6, "more is never worth less"
    assert slope == pytest.approx(min(1.0, max(0.0, 1.0 - score)), abs=1e-6)
    assert value == pytest.approx(score) if score <= 0 else value <= 0.5


def test_calibration_is_stored_and_learns_nothing():
    model = functional(lambda rngs: Calibration())
    params = {"mean": jnp.asarray(2.0), "std": jnp.asarray(0.5)}
    np.testing.assert_allclose(model.bind(params)(jnp.array([2.0, 3.0])), [0.0, 2.0])
    gradient = jax.grad(lambda params: model.bind(params)(jnp.array([2.0, 3.0])).sum())(params)
    assert gradient == {"mean": 0.0, "std": 0.0}


def test_weights_come_from_files_and_what_is_missing_is_named(real, tmp_path):
    rewards, params = real
    init = {f"reward_{name}": tmp_path / f"{name}.safetensors" for name in REWARDS}
    for name in REWARDS:
        safetensors_io.save(init[f"reward_{name}"], params[name], dtype=jnp.float32)
    _, loaded = load_rewards(CONFIG, init | {"clips": tmp_path})
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(ValueError, match="reward_motion=PATH.*python train.py reward_motion"):
        load_rewards(CONFIG, {name: path for name, path in init.items() if name != "reward_motion"})
    with pytest.raises(ValueError, match="--init reward_motion=.*missing"):
        load_rewards(CONFIG, init | {"reward_motion": init["reward_artifact"]})


def test_bad_input_is_refused(real):
    rewards, params = real
    shown = shown_clips()
    with pytest.raises(ValueError, match="no reward is called beauty; choose of identity"):
        rewards.gradient(params, shown, {"beauty": 1.0}, 1.0)
    with pytest.raises(ValueError, match="clip 0.0 must be above 0"):
        rewards.gradient(params, shown, {}, 0.0)
    with pytest.raises(ValueError, match="at least 12"):
        jax.eval_shape(rewards.scores, params, shown_clips(frames=8))
