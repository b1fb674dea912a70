"""The rewards' losses and figures against values worked out by hand, and what hard negatives change: one thing, and by how much."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.data.face import FaceState, neutral_state, sample_identity
from pikastream_jax.data.face_attributes import ATTRIBUTES, attribute_values, change_attribute
from pikastream_jax.nn.layers import functional
from pikastream_jax.rewards.network import Calibration
from pikastream_jax.training import reward_artifact, reward_identity, reward_lip_sync, reward_motion
from pikastream_jax.training.damage import DAMAGES, damage
from pikastream_jax.training.loop import TrainState
from pikastream_jax.training.reward_clips import TalkingClips
from pikastream_jax.training.reward_stage import calibrate, share_above


def test_one_attribute_changes_and_no_other():
    identity = jax.jit(sample_identity)(jax.random.key(0))
    change = jax.jit(change_attribute)
    for number, fields in enumerate(ATTRIBUTES.values()):
        other = change(jax.random.key(1), identity, number)
        for field in dataclasses.fields(identity):
            same = bool(jnp.all(getattr(other, field.name) == getattr(identity, field.name)))
            assert same or field.name in fields
        assert any(jnp.any(getattr(other, name) != getattr(identity, name)) for name in fields)
    names = [name for fields in ATTRIBUTES.values() for name in fields]
    assert len(set(names)) == len(names) and set(names) <= {field.name for field in dataclasses.fields(identity)}
    assert attribute_values(identity).shape == (len(names) + 2 * 6,), "six colors are three numbers each"


def test_identity_contrast_by_hand():
    """Two people; logits of the first (1, 0, 0.6, 0), of the second (0, 1, 0, -1), with sharpness 1."""
    reference, same = jnp.eye(2), jnp.eye(2)
    other = jnp.array([[0.6, 0.0], [0.0, -1.0]])
    first = np.log(np.exp(1) + 1 + np.exp(0.6) + 1) - 1
    second = np.log(1 + np.exp(1) + 1 + np.exp(-1)) - 1
    assert float(reward_identity.contrast(reference, same, other, 1.0)) == pytest.approx((first + second) / 2, rel=1e-5)
    assert float(reward_identity.told_error(jnp.array([0.0, 1.0]), jnp.zeros(2))) == pytest.approx((np.sqrt(1.01) - 0.1) / 2, rel=1e-5)


def test_identity_figures_count_only_what_can_be_seen():
    pictures = np.zeros((2, 3, 128, 128, 3), np.uint8)
    pictures[0, 2, :10, :10] = 200  # 100 pixels of 16384 change: 0.6%; the second person's change moves none
    people = reward_identity.People(pictures, np.zeros((2, 3, 1), np.float32), np.array([0, 0]))
    assert reward_identity.visible(people).tolist() == [True, False]
    x = np.array([[1.0, 0.0], [1.0, 0.0]])
    figures = reward_identity.identity_figures(x, np.array([[0.9, 0.1], [0.1, 0.9]]), np.array([[0.5, 0.5], [1.0, 0.0]]), people)
    assert figures["accuracy_skin"] == figures["accuracy"] == 1.0
    assert figures["verification"] == 0.5, "of the true pairs, 0.9 and 0.1, one is closer than the visible hard negative, 0.5"


def test_lip_sync_contrast_by_hand():
    """One clip of two windows, sharpness 1: cosines (1, 0.6) and (0, 0.8)."""
    lips, sound = jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), jnp.array([[[1.0, 0.0], [0.6, 0.8]]])
    rows = np.log(np.exp(1) + np.exp(0.6)) - 1, np.log(1 + np.exp(0.8)) - 0.8
    columns = np.log(np.exp(1) + 1) - 1, np.log(np.exp(0.6) + np.exp(0.8)) - 0.8
    assert float(reward_lip_sync.contrast(lips, sound, 1.0)) == pytest.approx(np.mean(rows + columns), rel=1e-5)
    assert reward_lip_sync.moment_accuracy(np.asarray(lips), np.asarray(sound)) == 1.0
    assert reward_lip_sync.moment_accuracy(np.asarray(lips), np.asarray(sound)[:, ::-1]) == 0.0


def test_sound_is_shifted_by_just_so_many_video_frames():
    """Every mel frame has the video frame it belongs to as its value; four of them a video frame, from one latent frame before the clip."""
    sound = np.repeat(np.arange(-4.0, 16.0), 4)[None, :, None].astype(np.float32)
    clips = TalkingClips(np.zeros((1, 12, 1, 1, 3), np.uint8), np.zeros((1, 1, 1, 3), np.uint8), jnp.asarray(sound), np.ones(1), np.zeros((1, 12, 15)))
    for shift in (-2, 0, 2):
        mel = clips.shown(shift).mel
        assert mel.shape == (1, 3, 16, 1)
        np.testing.assert_array_equal(mel.reshape(-1)[::4], np.arange(12) + shift)


def test_sync_figures_by_hand():
    scores = {-2: np.array([0.0, 2.0, 0.0]), 0: np.array([1.0, 1.0, 1.0]), 2: np.array([0.0, 1.0, 3.0])}
    figures = reward_lip_sync.sync_figures(scores, np.array([0.0, 0.0, 2.0]), np.array([1.0, 0.0, 0.0]))
    assert figures["accuracy_shift"] == pytest.approx((2 / 3 + 1.5 / 3) / 2)
    assert figures["accuracy_shift_speaking"] == 1.0 and figures["accuracy_other_speech"] == pytest.approx(2 / 3)


def test_wrong_motions_reverse_shuffle_and_freeze():
    video = jnp.arange(24.0)
    np.testing.assert_array_equal(reward_motion.reversed_frames(video), np.arange(24)[::-1])
    shuffled = np.asarray(reward_motion.shuffled_frames(jax.random.key(0), video, 4))
    assert sorted(shuffled) == list(range(24)) and (shuffled != np.arange(24)).any()
    assert (np.diff(shuffled.reshape(6, 4), axis=1) == 1).all(), "blocks stay whole"
    for seed in range(5):
        frozen = np.asarray(reward_motion.frozen_frames(jax.random.key(seed), video))
        still = np.flatnonzero(np.diff(frozen) == 0)
        assert 6 - 1 <= len(still) <= 16 - 1 and (np.diff(still) == 1).all(), "one stretch of 6 to 16 equal frames"
        moving = np.delete(np.arange(24), still + 1)
        np.testing.assert_array_equal(frozen[moving], moving)


def test_shaken_states_tremble_in_some_fields_and_stay_in_range():
    states = jax.tree.map(lambda leaf: leaf, neutral_state(200))
    for seed in range(4):
        moved = reward_motion.shaken(jax.random.key(seed), states)
        spread = {field.name: float(getattr(moved, field.name).std()) for field in dataclasses.fields(FaceState)}
        assert all(spread[name] == 0 for name in ("smile", "mouth_open", "mouth_width", "tongue", "breath", "brow_raise"))
        assert spread["yaw"] > 0.01 or spread["gaze_x"] > 0.1 or spread["blink"] > 0.05
        assert moved.blink.min() >= 0 and jnp.abs(moved.gaze_x).max() <= 1


def test_motion_loss_weighs_both_sides_alike():
    true, wrong = jnp.array([2.0]), jnp.array([-1.0, 0.0])
    by_hand = (np.log1p(np.exp(-2)) + (np.log1p(np.exp(-1)) + np.log(2)) / 2) / 2
    assert float(reward_motion.two_sided(true, wrong)) == pytest.approx(by_hand, rel=1e-5)


def test_damage_grows_with_strength_and_is_none_at_zero():
    video = jnp.clip(0.5 * jax.random.normal(jax.random.key(0), (4, 32, 32, 3)), -0.9, 0.9)
    apply = jax.jit(damage)
    for kind, name in enumerate(DAMAGES):
        changes = [float(jnp.abs(apply(jax.random.key(1), kind, s, video) - video).mean()) for s in (0.0, 0.1, 0.5, 1.0)]
        assert changes[0] < 1e-5 < changes[1] < changes[2] < changes[3], name
    tint = apply(jax.random.key(1), list(DAMAGES).index("tint"), 0.1, video) - video
    np.testing.assert_allclose(jnp.linalg.norm(tint, axis=-1), 0.03, rtol=1e-3)


def test_blocks_and_grids_have_the_sizes_of_patches_and_tokens():
    """Offsets of 8x8 or 16x16 pixels, moving or still; patterns that repeat after 4, 8 or 16, as strong whichever was drawn."""
    video, names = jnp.zeros((4, 64, 64, 3)), list(DAMAGES)
    apply = jax.jit(damage)
    sides, periods, still = set(), set(), set()
    for seed in range(24):
        blocks, grid = (np.asarray(apply(jax.random.key(seed), names.index(name), 0.5, video)) for name in ("blocks", "grid"))
        side = 16 if np.ptp(blocks.reshape(4, 4, 16, 4, 16, 3), axis=(2, 4)).max() == 0 else 8
        sides.add(side)
        assert np.ptp(blocks.reshape(4, 64 // side, side, 64 // side, side, 3), axis=(2, 4)).max() == 0 < np.ptp(blocks, axis=(1, 2)).min()
        still.add(bool((blocks == blocks[:1]).all()))
        shifts = [p for p in (4, 8, 16) if np.allclose(grid[:, p:, p:], grid[:, :-p, :-p], atol=1e-5)]
        periods.add(shifts[0])
        assert (grid == grid[:1]).all() and 0.015 < np.sqrt((grid**2).mean()) < 0.12
    assert sides == {8, 16} and periods == {4, 8, 16} and still == {False, True}


def test_artifact_losses_by_hand():
    error = reward_artifact.strength_error(jnp.array([0.1, 0.5]), jnp.array([0.1, 0.2]))
    assert float(error) == pytest.approx((np.sqrt(0.09 + 4e-4) - 0.02) / 2, rel=1e-4)
    ranking = reward_artifact.ranking_error(jnp.array([0.1, 0.3]), jnp.array([0.2, 0.2]))
    assert float(ranking) == pytest.approx((np.log1p(np.exp(-2)) + np.log1p(np.exp(2))) / 2, rel=1e-5)
    clean, strength = np.array([0.0, 0.0]), np.array([[0.2, 0.9]])
    figures = reward_artifact.artifact_figures(clean, np.full((len(DAMAGES), 2), [-0.1, 0.1]), -strength, strength)
    assert figures["rank_correlation"] == pytest.approx(1.0) and figures["accuracy"] == 0.5 and figures["loss"] == pytest.approx(0, abs=1e-6)


def test_calibration_follows_the_scores_of_true_clips():
    """A model whose raw score is the clip's first sound: over many updates the calibration is mean and spread of that."""

    class Loudness:
        def bind(self, params):
            return self

        def raw(self, shown):
            return shown.mel[:, 0, 0, 0]

    values = np.random.default_rng(0).normal(3.0, 2.0, 64).astype(np.float32)
    clips = TalkingClips(
        jnp.zeros((64, 4, 1, 1, 3), jnp.uint8), jnp.zeros((64, 1, 1, 3), jnp.uint8), jnp.tile(values[:, None, None], (1, 48, 1)), jnp.ones(64),
        jnp.zeros((64, 4, 15)),
    )
    params = {"calibration": {"mean": jnp.zeros(()), "std": jnp.ones(())}}
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, params, {})

    def step(state, key):
        state = calibrate(Loudness(), state, clips, key)
        return dataclasses.replace(state, step=state.step + 1), None

    state, _ = jax.lax.scan(step, state, jax.random.split(jax.random.key(0), 1500))
    assert state.ema["calibration"] == state.params["calibration"]
    assert float(state.ema["calibration"]["mean"]) == pytest.approx(values.mean(), abs=0.6)
    assert float(state.ema["calibration"]["std"]) == pytest.approx(values.std(), abs=0.6)
    calibrated = functional(lambda rngs: Calibration()).bind(state.ema["calibration"])(jnp.asarray(values))
    assert abs(float(calibrated.mean())) < 0.35 and float(calibrated.std()) == pytest.approx(1, abs=0.35)


def test_share_above_counts_ties_as_half():
    assert share_above(np.array([1.0, 1.0, 1.0, 1.0]), np.array([0.0, 1.0, 2.0, 0.0])) == 0.625
