"""From latents to rewards: decoding along a stream is the stream's own, and the surrogate's gradient is the reward's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.rewards import Rewards, Shown
from pikastream_jax.training.refl import RewardWeights, as_shown, decode_from, reference_picture, reward_loss
from tests.small import small_config, small_models

CONFIG = small_config()
RNG = np.random.default_rng(0)


class Linear:
    """Rewards of which the first two are linear in the video: <w, video>."""

    def __init__(self, *directions):
        self.models = {name: Bound(w) for name, w in zip(("identity", "motion"), directions, strict=True)}

    scores, gradient = Rewards.scores, Rewards.gradient


class Bound:
    def __init__(self, w):
        self.w = w

    def bind(self, params):
        return lambda shown: params * jnp.einsum("bthwc,thwc->b", shown.video, self.w)


def shown(video):
    return Shown(video, jnp.zeros((len(video), 128, 128, 3)), jnp.zeros((len(video), video.shape[1] // 4, 16, 4)))


def test_the_surrogate_climbs_a_linear_reward():
    """video = 2 x: the gradient by x is -2 (weight x w clipped to length 0.5, summed), a row's share of it."""
    w = [jnp.asarray(RNG.normal(size=(4, 128, 128, 3)), jnp.float32) for _ in range(2)]
    rewards, params = Linear(*w), {"identity": 1.0, "motion": 1e-4}
    # The first clip is worse than true ones by both rewards. The second is better, and nothing more is asked of it.
    x = jnp.stack([-(w[0] + w[1]), w[0] + w[1]])
    weights = RewardWeights(identity=3.0, lip_sync=0.0, motion=1.0, artifact=0.0)

    def loss(x):
        return reward_loss(rewards, params, shown(2.0 * x), weights, 0.5)

    (_, scores), gradient = jax.value_and_grad(loss, has_aux=True)(x)
    length = np.linalg.norm(w[0])
    assert length > 0.5 > 1e-4 * np.linalg.norm(w[1]), "one is clipped, the other is not"
    expected = -2.0 * (3.0 * 0.5 * w[0] / length + 1e-4 * w[1]) / 2
    np.testing.assert_allclose(gradient, np.stack([expected, 0.0 * expected]), rtol=1e-4, atol=1e-8)
    assert scores["identity"] == pytest.approx(float(jnp.mean(jnp.einsum("bthwc,thwc->b", 2 * x, w[0]))), rel=1e-4)
    values = {name: p * jnp.einsum("bthwc,thwc->b", 2 * x, w) for (name, p), w in zip(params.items(), w, strict=True)}
    assert scores["worth"] == pytest.approx(float(3 * (values["identity"][0] + 0.5) + values["motion"][0] + 0.5) / 2, rel=1e-4)


def test_nothing_is_won_beyond_black_and_white():
    """Rewards learned from pictures, which end there; a decoder's numbers do not."""
    pixels = jnp.asarray(RNG.uniform(-3, 3, size=(1, 4, 128, 128, 3)), jnp.float32)
    mel = jnp.zeros((1, 1, 16, 16))
    seen = as_shown(pixels, pixels[:, 0], mel)
    np.testing.assert_array_equal(seen.video, as_shown(jnp.clip(pixels, -1, 1), pixels[:, 0], mel).video)
    assert float(jnp.abs(seen.video).max()) <= 1 and float(jnp.abs(seen.reference).max()) <= 1
    slope = np.asarray(jax.grad(lambda pixels: jnp.sum(as_shown(pixels, pixels[:, 0], mel).video))(pixels))
    assert (slope[np.abs(pixels) > 1] == 0).all() and (slope[np.abs(pixels) < 1] != 0).all()


def test_pixels_are_those_of_the_stream_and_the_past_gets_no_gradient():
    models, params = small_models(CONFIG)
    vae = models.flash_vae
    latents = jnp.asarray(RNG.normal(size=(2, 5, *CONFIG.latent_grid, 4)), jnp.float32)

    @jax.jit
    def run(params, latents):
        whole = vae.bind(params.flash_vae).decode(params.statistics.restore(latents))

        def total(latents):
            pixels = decode_from(vae.bind(params.flash_vae), params.statistics, latents[:, :3], latents[:, 3:])
            return jnp.sum(pixels**2), pixels

        still = reference_picture(vae.bind(params.flash_vae), params.statistics, latents[:, 0])
        return whole, *jax.grad(total, has_aux=True)(latents), still

    whole, gradient, pixels, still = run(params, latents)
    np.testing.assert_allclose(pixels, whole[:, 12:], atol=2e-4)
    np.testing.assert_allclose(still, whole[:, 3], atol=2e-4, err_msg="a still is the first latent frame of a clip")
    assert (gradient[:, :3] == 0).all() and (np.abs(gradient[:, 3:]).max(axis=(0, 2, 3, 4)) > 0).all()


def test_what_is_shown():
    pixels = jnp.ones((2, 8, 48, 32, 3))
    mel = jnp.arange(2 * 2 * 20).reshape(2, 2, 20, 1)
    seen = as_shown(pixels, pixels[:, 0], mel)
    assert seen.video.shape == (2, 8, 128, 128, 3) and seen.reference.shape == (2, 128, 128, 3)
    assert seen.mel[0, 1, :, 0].tolist() == list(range(24, 40)), "the last 16 of 20"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(identity=-1.0), "weight -1.0 of reward identity must be finite and at least 0"),
        (dict.fromkeys(("identity", "lip_sync", "motion", "artifact"), 0.0), "all rewards have weight 0"),
    ],
)
def test_weights_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        functools.partial(RewardWeights, **given)()
