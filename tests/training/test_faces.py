"""Batches of faces for FlashVAE: crops are cut from the very picture, motion stays in its ranges and within its speed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.data.face import FaceState
from pikastream_jax.measuring.estimator import READERS, crop_origin
from pikastream_jax.training.faces import STATE_RANGES, face_batch, random_states

SIZE, CROP, FRAMES = 64, 32, 2


@pytest.fixture(scope="module")
def batches():
    draw = jax.jit(face_batch, static_argnums=(1, 2, 3, 4))
    key = jax.random.key(0)
    return draw(key, 2, FRAMES, SIZE, CROP), draw(key, 2, FRAMES, SIZE, SIZE)


def test_a_crop_is_the_picture_at_its_origin(batches):
    crop, whole = batches
    assert whole.video.shape == (2, FRAMES, SIZE, SIZE, 3) and crop.video.shape == (2, FRAMES, CROP, CROP, 3)
    assert whole.origin.tolist() == [[0, 0], [0, 0]]
    np.testing.assert_allclose(crop.boxes, whole.boxes, atol=1e-3)
    for row, (y, x) in enumerate(np.asarray(crop.origin, int)):
        # The renderer's levels are those of 8 bits; one of them is 2 / 255.
        np.testing.assert_allclose(crop.video[row], whole.video[row, :, y : y + CROP, x : x + CROP], atol=2.01 / 255)


def test_pictures_are_in_range_and_people_differ(batches):
    _, whole = batches
    assert whole.video.min() >= -1 and whole.video.max() <= 1 and whole.video.std() > 0.2
    assert np.abs(whole.video[0] - whole.video[1]).mean() > 0.05
    y0, x0, y1, x1 = np.moveaxis(np.asarray(whole.boxes), -1, 0)
    assert (y0 < y1).all() and (x0 < x1).all()
    assert (whole.boxes[:, :, 0, 0] > whole.boxes[:, :, 1, 0]).all(), "the mouth lies below the eyes"


def test_crops_lie_on_the_mouth_half_of_the_time():
    """Drawing is no part of the question, and the compiler leaves it out."""

    @jax.jit
    def places(key):
        batch = face_batch(key, 400, 1, SIZE, CROP)
        return batch.boxes[:, 0], batch.origin

    boxes, origin = (np.asarray(x) for x in places(jax.random.key(1)))
    assert (origin >= 0).all() and (origin <= SIZE - CROP).all() and (origin == np.round(origin)).all()
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2  # [crops, mouth and eyes, (y, x)]
    # Jitter is 0.3 crops each way at most; clipping to the picture can only move a crop's middle back towards the face.
    wanted = np.clip(centre - CROP / 2, 0, SIZE - CROP)
    near = (np.abs(origin[:, None] - wanted) <= 0.3 * CROP + 0.5).all(axis=-1)
    assert near[:, 0].mean() > 0.5 - 0.06
    assert near.any(axis=1).mean() > 0.75 - 0.06
    assert not near.any(axis=1).all(), "a quarter lies anywhere"


def test_crops_on_the_face_hold_all_that_is_read_of_it():
    """A quarter of the picture around mouth and eyes together; with a share of one half, half of the crops."""

    @functools.partial(jax.jit, static_argnums=1)
    def holding(key, share):
        batch = face_batch(key, 400, 1, 256, 128, share)
        middle = (batch.boxes[:, 0, :, :2] + batch.boxes[:, 0, :, 2:]) / 2
        inside = jnp.ones(400, bool)
        for index, name in enumerate(("mouth", "eyes")):
            corner = crop_origin(name, middle[:, index, 0], middle[:, index, 1]) - batch.origin
            size = jnp.array([READERS[name].height, READERS[name].width])
            inside &= jnp.all((corner >= 0) & (corner + size <= 128), axis=-1)
        return inside.mean()

    none, half, all_of_them = (float(holding(jax.random.key(0), share)) for share in (0.0, 0.5, 1.0))
    assert none < 0.1 and all_of_them > 0.8
    assert half == pytest.approx((none + all_of_them) / 2, abs=0.08)


def test_motion_stays_in_range_and_within_its_speed():
    assert set(STATE_RANGES) == {field.name for field in dataclasses.fields(FaceState)}
    states = jax.jit(jax.vmap(lambda key: random_states(key, 12)))(jax.random.split(jax.random.key(2), 200))
    for name, (low, high) in STATE_RANGES.items():
        track = np.asarray(getattr(states, name))
        assert track.shape == (200, 12)
        assert track.min() >= low - 1e-6 and track.max() <= high + 1e-6
        assert track.max() - track.min() > 0.7 * (high - low), "the whole range is visited"
        fastest = np.abs(np.diff(track, axis=1)).max() / (high - low)
        assert 0.02 < fastest <= 0.4 + 1e-5
    head, lips = (np.abs(np.diff(np.asarray(getattr(states, n)), axis=1)).max() for n in ("yaw", "mouth_open"))
    assert head <= 0.04 * 0.7 + 1e-5 and lips > 0.25, "the head is slow, the lips are fast"


def test_a_batch_follows_its_key():
    draw = jax.jit(lambda key: jax.vmap(lambda k: random_states(k, 3).yaw)(jax.random.split(key, 4)))
    np.testing.assert_array_equal(draw(jax.random.key(5)), draw(jax.random.key(5)))
    assert (draw(jax.random.key(5)) != draw(jax.random.key(6))).all()
    assert jnp.unique(draw(jax.random.key(5))[:, 0]).size == 4
