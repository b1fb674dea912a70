"""Streams whose blinks, nods and lips are known, because the test draws them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.data.face import neutral_state
from pikastream_jax.measuring.listening import listening, shut
from pikastream_jax.measuring.subjects import SPEECH, film, person, read_speech

SEED = 9_000_001


class Listener:
    """Blinks at the 10th and 40th frame, or with an odd seed at the 25th and looks past the viewer; turns and nods by the seed; lips of a sine for all."""

    height = 256

    def session(self, image, prompt, seed):
        self.frame, self.odd = 0, seed % 2
        return self

    def chunk_samples(self, index):
        return 7680

    def reconstruct(self, video):
        return video

    def step(self, audio):
        t = np.arange(self.frame, self.frame + 12)
        self.frame += 12
        blinks = np.isin(t, [25, 26] if self.odd else [10, 11, 40, 41])
        lips = np.where(t < 60, 0.0, 0.5 + 0.4 * np.sin(t))
        yaw, pitch = (np.sin(t / 6.0), np.cos(t / 9.0)) if self.odd else (np.cos(t / 6.0), np.cos(t / 9.0))
        moved = {"blink": blinks, "mouth_open": lips, "yaw": 0.10 * yaw, "gaze_x": (0.8 if self.odd else 0.0) - 0.22 * yaw, "pitch": 0.05 * pitch}
        states = dataclasses.replace(neutral_state(12), **{name: jnp.asarray(x, jnp.float32) for name, x in moved.items()})
        return film(person(SEED), states)

    def finish(self):
        return []


def test_the_beginnings_of_blinks():
    assert np.flatnonzero(shut(np.array([0.9, 0.6, 0.2, 0.5, 0.51, 1.0, 0.1, 0.7]))).tolist() == [0, 4, 7]


def test_known_streams(estimator):
    found = listening(Listener(), estimator, [SEED], [read_speech(SPEECH)], silent_chunks=5, spoken_chunks=2)
    made, seeds = found["generated"], found["seeds"]
    assert made["blinks_per_minute"] == pytest.approx(1.5 / (60 / 25 / 60)), "two and one in 60 frames"
    assert made["still_streams"] == 0.0 and made["opening"] < 0.1
    t = np.arange(60)
    assert made["yaw"] == pytest.approx(np.degrees(0.05 * (np.std(np.sin(t / 6)) + np.std(np.cos(t / 6)))), rel=0.2)
    assert made["pitch"] == pytest.approx(np.degrees(0.05 * np.std(np.cos(t / 9))), rel=0.3)
    assert made["eye_contact"] == pytest.approx(0.5, abs=0.06), "one looks at the viewer, the other past"
    assert seeds["lips"] > 0.95 and seeds["pitch"] > 0.9 and abs(seeds["yaw"]) < 0.3 and abs(seeds["lids"]) < 0.3
