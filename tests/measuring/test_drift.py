"""A stream of known faults: still pictures whose colour moves by a known step after the first minute."""

import numpy as np
import pytest

from pikastream_jax.measuring.calibration import IdentityMetric
from pikastream_jax.measuring.drift import drawn_drift, drift
from pikastream_jax.measuring.images import lab
from pikastream_jax.measuring.subjects import draw, person, portrait_state

METRIC = IdentityMetric(np.eye(32))
CHUNKS_A_MINUTE = 125
SEED = 3


class StillFace:
    """Shows the picture of a seed, darker by `step` levels from chunk 125 on."""

    height = 256

    def __init__(self, step=0, later_seed=SEED):
        self.step_by, self.later_seed = step, later_seed

    def session(self, image, prompt, seed):
        self.index = 0
        self.pictures = [image, draw(person(self.later_seed), portrait_state(self.later_seed))]
        return self

    def chunk_samples(self, index):
        return 7680

    def step(self, audio):
        later = self.index >= CHUNKS_A_MINUTE
        self.index += 1
        picture = self.pictures[later].astype(int) - (self.step_by if later else 0)
        return np.repeat(np.clip(picture, 0, 255).astype(np.uint8)[None], 12, axis=0)


def run(estimator, face):
    return drift(face, estimator, METRIC, np.zeros(160_000, np.float32), SEED, minutes=2)


def test_a_steady_stream_does_not_drift(estimator):
    report = run(estimator, StillFace())
    assert len(report["minutes"]) == 2
    assert report["colour_background"] == report["colour_skin"] == 0.0
    assert report["colour_skin_first_minute"] == pytest.approx(0.0, abs=1e-9)
    assert report["identity_change"] == pytest.approx(0.0, abs=1e-6)
    assert report["minutes"][0]["identity_distance"] == pytest.approx(0.0, abs=1e-4)
    assert abs(report["rss_growth_mb"]) < 60


def test_a_change_of_colour_is_measured_in_lab(estimator):
    report = run(estimator, StillFace(step=12))
    picture = draw(person(SEED), portrait_state(SEED))
    corner = np.concatenate([picture[:32, :32], picture[:32, -32:]], axis=1).mean(axis=(0, 1))
    expected = np.linalg.norm(lab(corner) - lab(corner - 12))
    assert report["colour_background"] == pytest.approx(expected, rel=1e-3)


def test_a_stream_that_answers_late_is_measured_too(estimator):
    class Late(StillFace):
        def step(self, audio):
            frames = super().step(audio)
            return frames if self.index > 3 else frames[:0]

    assert run(estimator, Late())["colour_background"] == 0.0


def test_another_face_raises_the_identity_distance(estimator):
    report = run(estimator, StillFace(later_seed=SEED + 1))
    assert report["identity_change"] > 0.5


def test_somebody_drawn_changes_by_what_happens_to_the_picture(estimator):
    """The head moves, so the reading changes a little; a face that another takes the place of after the first minute changes by more."""

    class Passes(StillFace):
        seen = 0

        def reconstruct(self, video):
            self.seen += 1
            later = self.later_seed != SEED and self.seen > 32  # 60 s in steps of 4 chunks of 0.48 s
            return np.repeat(self.pictures[1][None], len(video), axis=0) if later else video

    def report(later_seed):
        face = Passes(later_seed=later_seed)
        face.session(None, "", 0)
        return drawn_drift(face, estimator, METRIC, np.zeros(160_000, np.float32), SEED, minutes=2), face.seen

    (steady, seen), (swapped, _) = report(SEED), report(SEED + 1)
    assert seen == 64 and 0 <= steady["identity_change"] < 0.3 < 0.5 < swapped["identity_change"]
    assert steady["identity_first_minute"] == swapped["identity_first_minute"] > 0


def test_less_than_a_minute_is_refused(estimator):
    with pytest.raises(ValueError, match="at least 1"):
        drift(StillFace(), estimator, METRIC, np.zeros(160_000, np.float32), SEED, minutes=0.5)
