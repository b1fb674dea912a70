import numpy as np
import pytest

from pikastream_jax.measuring.calibration import calibrate, identity_metric


def test_metric_measures_in_units_of_the_scatter_within_a_person():
    """Readings with a known covariance: two of one person lie sqrt 2 apart, whatever the parameters' own scales."""
    rng = np.random.default_rng(0)
    scales = np.linspace(0.2, 3.0, 32)
    people = rng.normal(0, 5, (200, 1, 32))
    metric = identity_metric(list(people + rng.normal(0, 1, (200, 12, 32)) * scales))
    a, b = (people[:, 0] + rng.normal(0, 1, (200, 32)) * scales for _ in range(2))
    assert metric.distance(a, b).mean() == pytest.approx(np.sqrt(2), rel=0.03)
    assert metric.distance(a, a).max() == 0.0


def test_metric_discounts_what_moves_together():
    """A direction along which one person varies strongly counts less than one that stays still."""
    rng = np.random.default_rng(1)
    moving = np.zeros(32)
    moving[:2] = 1 / np.sqrt(2)
    readings = rng.normal(0, 0.1, (50, 12, 32)) + rng.normal(0, 2.0, (50, 12, 1)) * moving
    metric = identity_metric(list(readings))
    across = np.zeros(32)
    across[:2] = 1 / np.sqrt(2), -1 / np.sqrt(2)
    assert metric.distance(across, np.zeros(32)) > 1.5 * metric.distance(moving, np.zeros(32))


def test_the_shipped_estimator_is_good_enough_to_measure_with(estimator):
    figures, _ = calibrate(estimator, people=24)
    assert figures["opening"]["r"] > 0.98 and figures["opening"]["mae"] < 0.06
    assert figures["width"]["r"] > 0.95
    assert figures["smile"]["r"] > 0.95
    assert figures["closed_lips"]["right_side"] > 0.93
    assert figures["identity"]["auc_hard_distractors"] > 0.9


def test_too_few_people_are_refused(estimator):
    with pytest.raises(ValueError, match="at least 24"):
        calibrate(estimator, people=4)
