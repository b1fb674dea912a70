"""When a change shows, on readings that were made up."""

import dataclasses

import numpy as np
import pytest

from pikastream_jax.measuring.calibration import IdentityMetric
from pikastream_jax.measuring.estimator import Reading
from pikastream_jax.measuring.swaps import Swaps, frames_until, nearer_to_the_next

ZERO = np.zeros(40, np.float32)


def readings(identity):
    plain = {field.name: ZERO for field in dataclasses.fields(Reading)}
    return Reading(**plain | {"identity": identity})


def test_the_first_frame_of_what_stays():
    assert frames_until(np.arange(40) >= 13) == 13.0
    assert frames_until(np.ones(40, bool)) == 0.0


def test_a_flash_does_not_count():
    shows = np.arange(40) >= 20
    shows[5] = True
    assert frames_until(shows) == 20.0


def test_one_frame_in_ten_may_miss():
    shows = np.arange(40) >= 20
    shows[30] = False
    assert frames_until(shows) == 20.0
    shows[[21, 22, 24]] = False  # 4 of 20, then 2 of 17 from the 23rd on
    assert frames_until(shows) == 25.0, "14 of the 15 frames that are left"


def test_what_comes_too_late_to_stay_never_shows():
    assert frames_until(np.arange(40) >= 29) == float("inf")
    assert frames_until(np.arange(40) >= 28) == 28.0
    assert frames_until(np.zeros(0, bool)) == float("inf")


def test_who_is_nearer():
    """Two streams whose faces turn into each other along a line; they are halfway at frame 19.5."""
    known = np.zeros((2, 32))
    known[1] = 1.0
    share = np.linspace(0, 1, 40)[:, None]
    made = [readings(share * known[1]), readings((1 - share) * known[1])]
    assert [frames_until(shows) for shows in nearer_to_the_next(made, known, IdentityMetric(np.eye(32)))] == [20.0, 20.0]


def test_report():
    found = Swaps(np.array([5.0, 10.0, np.inf]), 40)
    report = found.report(25)
    assert report["frames"] == 10.0 and report["seconds"] == 0.4 and report["share_that_shows"] == pytest.approx(2 / 3)
    assert report["streams"] == [5.0, 10.0, None] and found.censored.tolist() == [5.0, 10.0, 40.0]
    assert Swaps(np.full(2, np.inf), 40).report(25)["frames"] is None
