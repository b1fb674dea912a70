"""The rewards' stages from end to end with very little of everything: updates, figures, calibration, and that the weights are loaded again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_corpus import small_corpus

from pikastream_jax.data.corpus import save_corpus
from pikastream_jax.rewards import REWARDS
from pikastream_jax.training import (
    reward_artifact,
    reward_clips,
    reward_identity,
    reward_lip_sync,
    reward_motion,
    reward_stage,
)
from pikastream_jax.training.loop import run
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.refl import load_rewards
from pikastream_jax.training.reward_clips import Painter, talking_clips
from pikastream_jax.weights import safetensors_io
from tests.rewards.test_scoring import shown_clips
from tests.small import small_config, small_models

CONFIG = small_config()
LITTLE = {"updates": 2, "batch": 2, "held_out": 2, "optimiser": OptimiserConfig(1e-3, warmup_steps=0)}
SETTINGS = {
    "identity": reward_identity.Settings(**LITTLE, people=4),
    "lip_sync": reward_lip_sync.Settings(**LITTLE, clips=2, latent_frames=5),
    "motion": reward_motion.Settings(**LITTLE, clips=2, latent_frames=6),
    "artifact": reward_artifact.Settings(**LITTLE, clips=2),
}
STAGES = {"identity": reward_identity, "lip_sync": reward_lip_sync, "motion": reward_motion, "artifact": reward_artifact}


def plain_pictures(identities, states, size):
    """In place of the renderer: skin all over, a square for the mouth as bright as it is open."""
    pictures = np.broadcast_to(np.asarray(identities.skin)[:, None, None], (len(states.yaw), size, size, 3)).copy()
    pictures[:, size // 2 : size * 3 // 4, size // 3 : size * 2 // 3] = np.asarray(states.mouth_open)[:, None, None, None]
    return np.clip(255 * pictures, 0, 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def little(tmp_path, monkeypatch):
    save_corpus(tmp_path / "speech.npz", small_corpus())
    for module in (reward_clips, reward_stage):
        monkeypatch.setattr(module, "SPEECH", tmp_path / "speech.npz")
    monkeypatch.setattr(reward_clips, "draw", plain_pictures)


@pytest.mark.slow
def test_every_stage_runs_resumes_and_its_weights_are_loaded(tmp_path):
    init = {}
    for name in REWARDS:
        stage = STAGES[name].build(CONFIG, 0, {}, SETTINGS[name])
        straight = run(stage, tmp_path / name)
        figures = stage.evaluate(straight, {})
        assert {"loss", "score_mean", "score_std"} <= figures.keys() and all(np.isfinite(value) for value in figures.values())
        assert any(name.startswith("accuracy") for name in figures)
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), stage.init().params, straight.params)
        assert max(jax.tree.leaves(moved)) > 0 and moved["calibration"]["std"] > 0
        init[f"reward_{name}"] = tmp_path / name
        if name == "motion":  # the loop is the same for all
            run(stage, tmp_path / "slices", steps=1)
            resumed = run(stage, tmp_path / "slices")
            jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    rewards, params = load_rewards(CONFIG, init)
    scores = rewards.scores(params, shown_clips())
    assert all(np.isfinite(score).all() for score in scores.values())


@pytest.mark.slow
def test_clips_follow_their_seed_and_a_share_passes_through_flash_vae(tmp_path):
    weights = tmp_path / "vae.safetensors"
    safetensors_io.save(weights, small_models(CONFIG)[1].flash_vae, dtype=jnp.float32)
    plain, passed = Painter(CONFIG, None, 0.5), Painter(CONFIG, weights, 0.5)

    def clips(painter, seed=0, split="train", **more):
        return talking_clips(CONFIG, painter, split, seed, 4, 3, **more)

    a, b = clips(plain), clips(passed)
    assert a.video.shape == (4, 12, 128, 128, 3) and a.reference.shape == (4, 128, 128, 3) and a.sound.shape == (4, 16 * 5, 16)
    np.testing.assert_array_equal(a.video[2:], b.video[2:])
    np.testing.assert_array_equal(a.reference[2:], b.reference[2:])
    assert (a.video[:2] != b.video[:2]).mean() > 0.5 and (a.reference[:2] != b.reference[:2]).mean() > 0.5
    jax.tree.map(np.testing.assert_array_equal, a, clips(plain))
    for other in (clips(plain, seed=1), clips(plain, split="held_out")):
        assert (other.reference != a.reference).any()
    part = clips(plain, part=(slice(60, 100), slice(30, 90)))
    np.testing.assert_array_equal(part.video, a.video[:, :, 60:100, 30:90])
    assert a.states.shape == (4, 12, 15) and (a.states[..., 9] >= 0).all()
    still = clips(plain, change=lambda key, states: dataclasses.replace(states, mouth_open=0.0 * states.mouth_open))
    assert (still.video[:, :, 64:90, 50:80] == 0).all()
    # The sound of the small corpus is its latent frame's number: it rises by one from each to the next.
    level = a.sound[:, ::16, 0]
    np.testing.assert_allclose(np.diff(level, axis=1), np.diff(level, axis=1)[0, 0], rtol=1e-4)


@pytest.mark.parametrize(
    ("module", "change", "says"),
    [
        (reward_motion, {"latent_frames": 5}, "latent_frames 5 must lie in 6 to 12"),
        (reward_lip_sync, {"latent_frames": 13}, "latent_frames 13 must lie in 5 to 12"),
        (reward_artifact, {"autoencoded": 1.5}, r"autoencoded 1.5 must lie in \[0, 1\]"),
        (reward_artifact, {"held_out": 1}, "held_out 1 must be at least 2"),
        (reward_identity, {"people": 3}, "people 3 must be at least the batch, 16"),
    ],
)
def test_settings_that_make_no_sense_are_refused(module, change, says):
    with pytest.raises(ValueError, match=says):
        module.Settings(**change)
