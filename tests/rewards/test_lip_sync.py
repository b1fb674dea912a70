"""Lip sync: the score by hand, windows of picture and sound that belong together, and that a trained one drops for shifted sound."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pikastream_jax.nn.layers import functional, initial_params
from pikastream_jax.rewards import Shown
from pikastream_jax.rewards.lip_sync import MOUTH, LipSyncReward, _windows, confidence


def test_confidence_by_hand():
    """Three windows in the plane: cosines with their own sound 1, 0.6, -1; with the others' 0, 0.8, 0.6, 0, -0.8 and so on."""
    lips = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    sound = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    cosine = np.array([[1.0, 1.0, 0.0], [0.6, 0.6, -0.8], [0.0, 0.0, -1.0]])
    np.testing.assert_allclose(lips @ sound.T, cosine)
    own, others = (1.0 + 0.6 - 1.0) / 3, (1.0 + 0.0 + 0.6 - 0.8 + 0.0 + 0.0) / 6
    np.testing.assert_allclose(confidence(jnp.asarray(lips)[None], jnp.asarray(sound)[None]), [own - others], rtol=1e-5)


def test_windows_of_pictures_and_sound_cover_the_same_time():
    frames = jnp.arange(12.0)[None, :, None]
    mel = jnp.arange(48.0)[None, :, None] / 4  # four mel frames a video frame, each with the frame's time
    seen, heard = _windows(frames, 8, 2), _windows(mel, 32, 8)
    assert seen.shape == (1, 3, 8) and heard.shape == (1, 3, 32)
    np.testing.assert_array_equal(seen[0, 1], jnp.arange(2.0, 10.0))
    np.testing.assert_array_equal(jnp.floor(heard[0, 1, ::4]), seen[0, 1])


def constructed(key, clips=4, frames=12, mels=8):
    """Mouths as bright as their frame's sound is loud, and nothing else in the picture."""
    level = jax.random.uniform(key, (clips, frames), minval=-1)
    video = jnp.zeros((clips, frames, 128, 128, 3)).at[:, :, *MOUTH].set(level[:, :, None, None, None])
    mel = jnp.broadcast_to(level.reshape(clips, frames // 4, 4, 1).repeat(4, axis=2), (clips, frames // 4, 16, mels))
    return Shown(video, jnp.zeros((clips, 128, 128, 3)), mel)


@pytest.mark.slow
def test_the_score_drops_when_the_sound_is_shifted():
    model = functional(lambda rngs: LipSyncReward(8, rngs=rngs))
    params = initial_params(lambda rngs: LipSyncReward(8, rngs=rngs), jax.random.key(0))
    optimiser = optax.adam(2e-3)

    @jax.jit
    def update(params, state, key):
        gradient = jax.grad(lambda params: -model.bind(params)(constructed(key)).mean())(params)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimiser.init(params)
    for step in range(20):
        params, state = update(params, state, jax.random.key(step))
    shown = constructed(jax.random.key(99))
    mel = shown.mel.reshape(4, 48, 8)
    score = jax.jit(lambda mel: model.bind(params)(Shown(shown.video, shown.reference, mel.reshape(shown.mel.shape))))
    right, late, early = (np.asarray(score(jnp.roll(mel, shift, axis=1))) for shift in (0, 8, -8))  # two video frames
    assert (right > late).all() and (right > early).all()
