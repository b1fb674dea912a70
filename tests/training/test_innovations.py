"""What is new in a motion: against processes whose news are known because they were put in."""

import jax
import numpy as np
import pytest
import scipy.stats

from pikastream_jax.measuring.estimator import READERS
from pikastream_jax.training.innovations import QUANTITIES, fit_innovations, innovations, motion

OUTPUTS = sum(reader.outputs for reader in READERS.values())
COLUMN = {"yaw": 4, "pitch": 5, "roll": 6, "gaze_x": 22, "gaze_y": 23, "blink": 24}  # counted by hand in `READERS`


@pytest.fixture(scope="module")
def process():
    """2,000 clips of 9 latent frames: a yaw that swings, eyes that keep on their target while it does, and rare blinks."""
    rng = np.random.default_rng(0)
    n, f, warm = 2000, 9, 30
    truth, news = np.zeros((n, f, OUTPUTS)), np.zeros((n, f, 2))
    yaw, eyes = np.zeros((n, f + warm)), np.zeros((n, f + warm))
    for t in range(2, f + warm):
        step, jump = rng.normal(size=(2, n)) * [[0.1], [0.2]]
        yaw[:, t] = 1.2 * yaw[:, t - 1] - 0.5 * yaw[:, t - 2] + step
        eyes[:, t] = 0.8 * eyes[:, t - 1] - 2.0 * step + jump
        if t >= warm:
            news[:, t - warm] = np.stack([step, jump], axis=1)
    truth[..., COLUMN["yaw"]], truth[..., COLUMN["gaze_x"]] = yaw[:, warm:], eyes[:, warm:]
    blinks = rng.random((n, f)) < 0.05
    truth[..., COLUMN["blink"]] = np.where(blinks, rng.uniform(1.0, 2.0, (n, f)), -0.5)
    return truth.astype(np.float32), news, blinks


@pytest.fixture(scope="module")
def told(process):
    truth, _, _ = process
    fitted = fit_innovations(truth)
    return np.asarray(jax.jit(innovations)(fitted, truth, jax.random.key(1)))


def test_the_columns():
    truth = np.arange(OUTPUTS, dtype=np.float32)[None]
    assert motion(truth)[0].tolist() == [COLUMN[name] for name in QUANTITIES]


def test_news_are_found_again(process, told):
    """From the third latent frame on, where enough of the past is seen; what the head's turn does to the eyes is not told twice."""
    _, news, _ = process
    yaw, eyes = (told[:, 2:, QUANTITIES.index(name)] for name in ("yaw", "gaze_x"))
    assert np.corrcoef(yaw.ravel(), news[:, 2:, 0].ravel())[0, 1] > 0.99
    assert np.corrcoef(eyes.ravel(), news[:, 2:, 1].ravel())[0, 1] > 0.99
    assert abs(np.corrcoef(eyes.ravel(), yaw.ravel())[0, 1]) < 0.03


def test_news_are_standard_normal_and_new_in_every_frame(told):
    assert told.shape == (2000, 9, 6) and np.isfinite(told).all()
    for k in range(6):
        distance = scipy.stats.kstest(told[..., k].ravel(), "norm").statistic
        assert distance < 0.02, QUANTITIES[k]
        # Without a blink there is nothing to foretell but what a little regression on everything else leaves of it.
        limit = 0.1 if QUANTITIES[k] == "blink" else 0.03
        assert abs(np.corrcoef(told[:, 2:-1, k].ravel(), told[:, 3:, k].ravel())[0, 1]) < limit, QUANTITIES[k]


def test_the_beginning_of_a_blink_is_the_largest_of_news_and_what_follows_is_none(process, told):
    _, _, blinks = process
    blink, begins = told[:, 1:, QUANTITIES.index("blink")], blinks[:, 1:]
    goes_on = blinks[:, :-1]
    first, other = blink[begins & ~goes_on], blink[~begins & ~goes_on]
    assert np.mean(other > first.min()) < 1e-3
    assert first.min() == pytest.approx(scipy.stats.norm.ppf(1 - blinks.mean()), abs=0.1)
    assert abs(blink[goes_on].mean()) < 0.1 and blink[goes_on].std() == pytest.approx(1, abs=0.1)


def test_the_first_latent_frame_has_no_past_and_tells_nothing(process, told):
    truth, _, _ = process
    for k, name in enumerate(QUANTITIES):
        if truth[:, 0, COLUMN[name]].std() > 0:
            assert abs(np.corrcoef(told[:, 0, k], truth[:, 0, COLUMN[name]])[0, 1]) < 0.08


def test_clips_too_short_to_look_back(process):
    truth, _, _ = process
    with pytest.raises(ValueError, match="clips of 3 latent frames: .* at least 4"):
        fit_innovations(truth[:, :3])
