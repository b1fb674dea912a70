import numpy as np
import pytest

from pikastream_jax.measuring.lipsync import MAX_LAG, Closures, closure_runs, compare, correlations, match_closures


def smooth_curve(seed, frames=200):
    rng = np.random.default_rng(seed)
    return np.convolve(rng.uniform(0, 1, frames + 4), np.ones(5) / 5, mode="valid")


@pytest.mark.parametrize("lag", [-7, -1, 0, 3, 10])
def test_correlation_finds_a_known_lag(lag):
    true = smooth_curve(0)
    shifted = np.roll(true, lag)
    measured = 3 * shifted - 1  # gain and offset do not matter
    r = correlations(true, measured)
    assert int(r.argmax()) - MAX_LAG == lag
    assert r.max() == pytest.approx(1.0)


def test_correlation_equals_numpys():
    true, measured = smooth_curve(1), smooth_curve(2)
    r = correlations(true, measured)
    assert r[MAX_LAG] == pytest.approx(np.corrcoef(true, measured)[0, 1])
    assert r[MAX_LAG + 4] == pytest.approx(np.corrcoef(true[:-4], measured[4:])[0, 1])
    assert r[MAX_LAG - 2] == pytest.approx(np.corrcoef(true[2:], measured[:-2])[0, 1])


def test_a_curve_that_never_moves_counts_as_no_correlation():
    true = smooth_curve(3)
    still = np.full_like(true, 0.4)
    assert np.isnan(correlations(true, still)).all()
    assert compare([true], [still], [true], [true])["opening"]["r"] == 0.0


def test_closures_begin_after_an_open_frame():
    opening = np.asarray([0.0, 0.0, 0.5, 0.0, 0.5, 0.05, 0.04, 0.5, 0.0])
    assert closure_runs(opening) == [(3, 3), (5, 6), (8, 8)]


def with_closures(at, frames=60, length=2):
    opening = np.full(frames, 0.6)
    for start in at:
        opening[start : start + length] = 0.0
    return opening


def test_equal_curves_have_f1_of_one():
    curve = with_closures([5, 20, 40])
    assert match_closures(curve, curve) == Closures(3, 3, 3)


def test_closures_one_frame_away_match_and_two_frames_away_do_not():
    true = with_closures([10, 30, 50], length=1)
    near, far = with_closures([11, 29, 50], length=1), with_closures([12, 28, 50], length=1)
    assert match_closures(true, near).matched == 3
    assert match_closures(true, far).matched == 1


def test_missed_and_invented_closures_lower_recall_and_precision():
    counted = match_closures(with_closures([5, 20, 40, 50]), with_closures([5, 30]))
    report = counted.report()
    assert (counted.matched, counted.true, counted.measured) == (1, 4, 2)
    assert report["recall"] == 0.25 and report["precision"] == 0.5
    assert report["f1"] == pytest.approx(1 / 3)


def test_lips_that_flutter_through_a_pause_match_once():
    true = with_closures([10], length=12)
    fluttering = true.copy()
    fluttering[[12, 14, 16, 18]] = 0.5
    assert match_closures(true, fluttering) == Closures(1, 1, 5)


def test_a_mouth_that_never_closes_or_never_opens_scores_nothing():
    true = with_closures([5, 20, 40])
    assert match_closures(true, np.full(60, 0.5)).f1 == 0.0
    assert match_closures(true, np.zeros(60)).f1 == 0.0


def test_compare_pools_closures_and_averages_correlation():
    true = [smooth_curve(4), smooth_curve(5)]
    late = [np.roll(curve, 2) for curve in true]
    report = compare(true, late, true, true)
    assert report["opening"]["lag_frames"] == 2
    assert report["opening"]["r"] == pytest.approx(1.0)
    assert report["opening"]["r_at_lag_0"] < 0.95
    assert report["width"]["lag_frames"] == 0
    assert report["opening"]["clips"] == 2


def test_closures_are_compared_with_chance():
    """Chance is the same curves against the other clip's truth: here the clips share one closure of three."""
    curves = [with_closures([5, 20, 40]), with_closures([10, 30, 40])]
    closures = compare(curves, curves, curves, curves)["closures"]
    assert closures["f1"] == 1.0
    assert closures["f1_chance"] == pytest.approx(1 / 3)


def test_too_short_curves_are_refused():
    with pytest.raises(ValueError, match="25 frames"):
        correlations(np.zeros(20), np.zeros(20))
