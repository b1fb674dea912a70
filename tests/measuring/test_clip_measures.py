"""Measures of one clip on readings that were made up: what is wrong with them is known."""

import dataclasses

import numpy as np
import pytest

from pikastream_jax.data.motion import SpeechTrack
from pikastream_jax.measuring.calibration import IdentityMetric
from pikastream_jax.measuring.clip_measures import MEASURES, clip_truth, measured, other_people
from pikastream_jax.measuring.estimator import COLUMNS, READERS, Reading

METRIC = IdentityMetric(np.eye(32))
F, T = 9, 36
OPENING = np.tile([0.0, 0.4, 0.8, 0.4], 9)


def truth():
    """Readings at their means, but for a smile of 0.6 x 0.5 and a face of ones; lips that open and close."""
    columns = np.zeros((F, len(COLUMNS)))
    columns[:, COLUMNS == "smile"] = 0.5
    columns[:, COLUMNS == "identity"] = 1.0
    flat = np.zeros(T, np.float32)
    track = SpeechTrack(mouth_open=OPENING, mouth_width=np.linspace(-1, 1, T), tongue=flat, activity=flat, excitement=flat)
    return clip_truth(columns, track)


def reading(**changed):
    """What the truth is, read without an error."""
    means = {name: mean for reader in READERS.values() for name, (mean, _) in reader.quantities.items()}
    plain = {field.name: np.full(T, means.get(field.name, 0.0)) for field in dataclasses.fields(Reading)}
    true = {"opening": OPENING, "width": 0.3 * truth().width, "smile": np.full(T, 0.3), "identity": np.ones((T, 32))}
    return Reading(**plain | true | changed)


FRAMES = np.zeros((T, 64, 64, 3), np.uint8)
OTHERS = np.stack([np.full(32, 3.0), np.full(32, -2.0)])


def judged(frames=FRAMES, **changed):
    return measured(frames, reading(**changed), truth(), OTHERS, METRIC)


def test_the_truth_is_faultless():
    found = judged()
    assert set(found) == set(MEASURES)
    assert (found["opening_r"], found["width_r"]) == pytest.approx((1.0, 1.0))
    assert found["closures_f1"] == found["identity_wins"] == 1.0
    zero = ("opening_error", "identity_distance", "smile_error", "expression_error", "pose_error", "flicker", "yaw_deviation", "blinks_per_minute")
    assert [found[name] for name in zero] == pytest.approx([0.0] * len(zero), abs=1e-6)


def test_errors_by_hand():
    found = judged(opening=OPENING + 0.05, smile=np.full(T, 0.9), yaw=np.full(T, np.radians(3.0)), identity=np.full((T, 32), 2.5))
    assert found["opening_error"] == pytest.approx(0.05) and found["smile_error"] == pytest.approx(0.6)
    assert found["expression_error"] == pytest.approx(1.0 / 5), "0.6 of a scale of 0.6, one quantity of five"
    assert found["pose_error"] == pytest.approx(1.0), "three degrees in one angle of three"
    assert found["identity_distance"] == pytest.approx(1.5) and found["identity_wins"] == 0.0, "the other at 3 is nearer"


def test_errors_that_cancel_within_a_clip_still_count():
    smile = np.where(np.arange(T) < 16, 0.5, 0.1)
    assert judged(smile=smile)["smile_error"] == pytest.approx(0.2)


def test_blinks_and_flicker():
    blink = np.zeros(T)
    blink[[4, 5, 20]] = 0.9
    frames = FRAMES.copy()
    frames[1::2, :8, :8] = 4  # one corner of two
    found = judged(frames, blink=blink)
    assert found["blinks_per_minute"] == pytest.approx(2 / (T / 25 / 60)) and found["flicker"] == 2.0


def test_lips_that_are_still_have_no_correlation():
    assert np.isnan(judged(opening=np.full(T, 0.5))["opening_r"])


def test_other_people():
    people = np.arange(30.0)[:, None].repeat(32, axis=1)
    assert other_people(people, 25)[:, 0].tolist() == [26, 27, 28, 29, *range(16)]
    assert other_people(people[:3], 1)[:, 0].tolist() == [2, 0]
    with pytest.raises(ValueError, match="no other people"):
        other_people(people[:1], 0)
