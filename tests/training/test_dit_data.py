"""What the DiT's stages are given: windows by number from the disk, and what is made of them on the device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coded_clips import CHANGED, COUNT, LENGTH, coded_batch, coded_clip, coded_constants, write_coded

from pikastream_jax.data.corpus import MEL_STEP
from pikastream_jax.text.tokenizer import COMMA
from pikastream_jax.training import dit_data
from pikastream_jax.training.clips import conclude
from pikastream_jax.training.records import Plan, read_constants, write_records
from tests.small import small_config

CONFIG = small_config(chunk=3, window=3)  # 6 x 4 latents of 8 pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_coded(tmp_path_factory.mktemp("coded") / "clips", CONFIG)


def level(batch):
    """The quantised level of every mel frame. [b, f, m]"""
    return np.round((np.asarray(batch.mel)[..., 0] * 15 - 55 + 80) / MEL_STEP).astype(int)


@pytest.fixture
def plain_sound(monkeypatch):
    """Training without the random channel, most of what is compiled otherwise."""
    monkeypatch.setattr(dit_data, "augment", lambda mel, key, config: mel)


def prepare(batch, train, **options):
    run = jax.jit(lambda data, batch, key: dit_data.prepare_batch(CONFIG, data, batch, key, train=train, **options))
    return run(coded_constants(CONFIG), batch, jax.random.key(0))


@pytest.fixture(scope="module")
def held_out(folder):
    return prepare(dit_data.windows(CONFIG, folder, "held_out", 5, 6, None)[0], train=False)


def clip_and_offset(batch):
    first = np.asarray(batch.latents[:, 0, 0, 0, 0], int)
    return first // 100, first % 100


def test_held_out_clips_come_in_order_from_their_start(held_out):
    batch = held_out
    assert batch.latents[:, :, 0, 0, 0].tolist() == [[100 * c + f for f in range(6)] for c in (0, 1, 2, 3, 0)]
    np.testing.assert_allclose(batch.truth[..., 0], batch.latents[..., 0, 0, 0] / 100, rtol=1e-6)
    np.testing.assert_array_equal(batch.opening, np.tile(np.arange(24).reshape(6, 4) % 16 / 32, (5, 1, 1)))
    assert batch.opening.dtype == jnp.float32
    assert batch.reference[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 1]
    assert batch.other_reference[:, 0, 0, 0].tolist() == [1, 1, 2, 3, 4], "the row before"
    assert batch.tokens[:, :, 0].tolist() == [[10 + c, 20 + c] for c in (0, 1, 2, 3, 0)]
    assert batch.valid.tolist() == [[4, 5]] * 5 and batch.keep_audio.all(), "nothing is dropped"
    # A slice is 16 mel frames here, exactly its latent frame's own.
    expected = np.array([[5 + c + f for f in range(6)] for c in (0, 1, 2, 3, 0)])
    assert (level(batch) == expected[..., None]).all()


def test_windows_are_whole_stretches_with_their_own_sound_and_captions(folder):
    batch = dit_data.windows(CONFIG, folder, "train", 64, 5, 0)[0]
    clip, offset = clip_and_offset(batch)
    assert set(clip) == set(range(COUNT)) and set(offset) == set(range(LENGTH - 5 + 1))
    at = offset[:, None] + np.arange(5)
    assert (batch.latents[..., 0, 0, 0].astype(int) == 100 * clip[:, None] + at).all()
    np.testing.assert_array_equal(batch.opening, (4 * at[..., None] + np.arange(4)) % 16 / 32)
    assert (batch.mel[:, ::16, 0] == 5 + clip[:, None] + at).all() and batch.mel.shape[1] == 5 * 16
    assert (batch.tokens[:, 0, 0] == 10 + clip).all()
    assert (batch.frame_prompt == ((clip % 2 == 1)[:, None] & (at >= CHANGED))).all()
    np.testing.assert_array_equal(batch.reference[:, 0, 0, 0], 1 + clip)


def test_element_n_is_the_same_wherever_one_starts(folder):
    """So a run that is stopped goes on with the very batches; and they are none too alike."""
    asked = [dit_data.windows(CONFIG, folder, "train", 3, 5, 7) for _ in range(2)]
    straight = [asked[0][n] for n in range(9)]
    for n in (8, 3, 0, 5):
        jax.tree.map(np.testing.assert_array_equal, asked[1][n], straight[n])
    # Also through grain's own iterator, from a stored position.
    iterator = iter(asked[0].to_iter_dataset())
    for _ in range(4):
        next(iterator)
    state = iterator.get_state()
    again = iter(asked[1].to_iter_dataset())
    again.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, next(again), straight[4])
    clips, offsets = zip(*map(clip_and_offset, straight), strict=True)
    rounds = np.concatenate(clips)[: 6 * COUNT].reshape(6, COUNT)
    assert (np.sort(rounds, axis=1) == np.arange(COUNT)).all(), "every clip once in each round"
    assert len({tuple(row) for row in rounds}) > 3 and len(set(np.concatenate(offsets))) > 5
    other = dit_data.windows(CONFIG, folder, "train", 3, 5, 8)
    assert any((a.latents != other[n].latents).any() for n, a in enumerate(straight))


def test_only_the_best_are_curated(tmp_path):
    folder = write_coded(tmp_path / "clips", CONFIG, count=8)
    batch = dit_data.windows(CONFIG, folder, "train", 30, 5, 0, curated=True)[0]
    assert set(clip_and_offset(batch)[0]) == {6, 7}, "a quarter of eight; later clips are better"
    with pytest.raises(ValueError, match="curated clips of 'held_out'"):
        dit_data.windows(CONFIG, folder, "held_out", 30, 5, 0, curated=True)
    assert dit_data.best_clips(np.array([0.5, 0.1, 0.5, 0.5, 0.2, 0.0, 0.0, 0.0])).tolist() == [0, 2], "ties by number"


def test_latents_are_normalised(tmp_path):
    """By the statistics over the training clips, which stand beside them."""
    folder = tmp_path / "clips"
    write_records(folder, Plan({"train": 4}, 4, {}), lambda split, first, count: (coded_clip(CONFIG, i) for i in range(count)), conclude)
    value = 100.0 * np.arange(4)[:, None] + np.arange(LENGTH)
    constants = read_constants(folder)
    np.testing.assert_allclose(constants["statistics.mean"], value.mean(), rtol=1e-6)
    np.testing.assert_allclose(constants["statistics.std"], value.std(), rtol=1e-6)
    batch = dit_data.windows(CONFIG, folder, "train", 4, LENGTH, None)[0]
    np.testing.assert_allclose(batch.latents[..., 0, 0, 0], (value - value.mean()) / value.std(), atol=2e-3)
    np.testing.assert_allclose(batch.reference[:, 0, 0, 0], (np.arange(1, 5) - value.mean()) / value.std(), atol=2e-3)


def test_clips_that_do_not_fit_are_refused(folder):
    other = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, length=9))
    with pytest.raises(ValueError, match=r"tokens have the shape \(2, 6\), preset small needs \(2, 9\): make clips of this preset"):
        dit_data.windows(other, folder, "train", 2, 3, 0)
    with pytest.raises(ValueError, match="windows of 13 latent frames out of clips of 12: ask for 1 to 12"):
        dit_data.windows(CONFIG, folder, "train", 2, 13, 0)


def test_clips_made_before_openings_were_kept_are_refused(tmp_path):
    def old(split, first, count):
        for number in range(first, first + count):
            clip = coded_clip(CONFIG, number)
            del clip["opening"]
            yield clip

    write_records(tmp_path / "clips", Plan({"train": 2}, 2, {}), old, conclude)
    with pytest.raises(ValueError, match="clips lack opening: delete the folder and make it anew"):
        dit_data.windows(CONFIG, tmp_path / "clips", "train", 2, 3, 0)


def test_weights_by_hand(held_out):
    weight = held_out.weight[0, 1]
    raw = np.ones((6, 4))
    raw[1:3, 1] += 5.0  # mouth
    raw[0, :] += 1.5  # eyes
    np.testing.assert_allclose(weight, raw / raw.mean(), rtol=1e-5)


def test_the_sound_of_training_is_varied_row_by_row(held_out):
    varied = prepare(coded_batch(CONFIG, 8, 6), train=True)
    assert np.isfinite(varied.mel).all() and varied.mel.shape[2:] == held_out.mel.shape[2:]
    # Where nothing is varied, the bands of a mel frame and the mel frames of a latent frame are all alike.
    assert (np.std(held_out.mel, axis=(2, 3)) < 1e-5).all()
    assert len({round(float(row.mean()), 3) for row in np.asarray(varied.mel)}) == 8
    assert np.std(varied.mel, axis=(2, 3)).max() > 0.1


def test_a_tenth_of_the_rows_loses_each_condition_on_its_own(plain_sound):
    batch = prepare(coded_batch(CONFIG, 3000, 1), train=True)
    no_face = np.asarray(batch.reference == 0).all(axis=(1, 2, 3))
    no_prompt, no_sound = (np.asarray(batch.valid) == 1).all(axis=1), ~np.asarray(batch.keep_audio)
    for dropped in (no_face, no_prompt, no_sound):
        assert dropped.mean() == pytest.approx(0.1, abs=0.02)
    for one, other in ((no_face, no_prompt), (no_prompt, no_sound), (no_face, no_sound)):
        assert (one & other).mean() == pytest.approx(0.01, abs=0.006)
    assert (np.asarray(batch.valid)[~no_prompt] == [4, 5]).all() and (batch.other_reference != 0).all()


def test_captions_are_cut_at_commas():
    """Three in ten end before one of their commas, each as often; the comma after the caption's end counts for nothing."""
    tokens = jnp.asarray([[1, 50, COMMA, 51, COMMA, 52, 0, COMMA]] * 4000 + [[1, 50, 51, 52, 53, 54, 55, 56]] * 10).reshape(-1, 2, 8)
    valid = jnp.asarray([6] * 4000 + [8] * 10).reshape(-1, 2)
    left = np.asarray(dit_data._cut_captions(jax.random.key(0), tokens, valid)).ravel()
    assert (left[4000:] == 8).all()
    shares = [(left[:4000] == end).mean() for end in (2, 4, 6)]
    np.testing.assert_allclose(shares, [0.15, 0.15, 0.7], atol=0.03)
    assert set(left[:4000]) == {2, 4, 6}


def test_motions_that_clips_do_not_tell_of_are_refused():
    config = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, motion=5))
    with pytest.raises(ValueError, match="dit.motion 5: clips tell of 6"):
        dit_data.prepare_batch(config, {}, coded_batch(CONFIG, 2, 3), jax.random.key(0))


def test_a_crop_is_the_same_part_of_video_references_and_weight(plain_sound):
    place = np.stack(np.meshgrid(np.arange(6.0), np.arange(4.0), indexing="ij"), axis=-1).astype(np.float16)  # [6, 4, (row, column)]
    place = np.tile(place, 2)
    given = coded_batch(CONFIG, 64, 2, latents=np.broadcast_to(place, (2, 6, 4, 4)))
    given = dataclasses.replace(given, reference=(100 + np.arange(64)[:, None, None, None] + place).astype(np.float16))
    batch, whole = prepare(given, train=True, crop=0.5), prepare(given, train=True)
    # Half of 3 x 2 tokens, rounded up, is 2 x 1 tokens: 4 x 2 latents, from one of 2 x 2 corners.
    assert batch.latents.shape == (64, 2, 4, 2, 4) and batch.weight.shape == (64, 2, 4, 2)
    corner = np.asarray(batch.latents[:, 0, 0, 0, :2], int)
    assert {tuple(c) for c in corner} == {(0, 0), (0, 2), (2, 0), (2, 2)}
    for row, (y, x) in enumerate(corner):
        part = (row, slice(y, y + 4), slice(x, x + 2))
        np.testing.assert_array_equal(batch.latents[row], whole.latents[row, :, y : y + 4, x : x + 2])
        np.testing.assert_array_equal(batch.reference[row], whole.reference[part])
        np.testing.assert_array_equal(batch.other_reference[row], whole.other_reference[part])
        weight = whole.weight[row, :, y : y + 4, x : x + 2]
        np.testing.assert_allclose(batch.weight[row], weight / weight.mean(axis=(1, 2), keepdims=True), rtol=1e-5)
        # The boxes stay on the same pixels: their first corner, seen from the part's own.
        np.testing.assert_allclose(batch.boxes[row, 0, 0, :2], [9 - 8 * y, 8 - 8 * x])
        np.testing.assert_allclose(batch.boxes[row, 0, 1, 2:], [7.5 - 8 * y, 32 - 8 * x])
    np.testing.assert_array_equal(batch.mel, whole.mel)
    np.testing.assert_array_equal(batch.truth, whole.truth)
    np.testing.assert_array_equal(batch.opening, whole.opening)
