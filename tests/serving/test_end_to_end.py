"""The shipped model behind the command line: the only tests here that do not use the fake generator."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from media import play

from pikastream_jax.measuring import subjects
from pikastream_jax.measuring.estimator import Estimator
from pikastream_jax.measuring.streams import generated, make_scene, samples_of
from pikastream_jax.serving.command import main
from pikastream_jax.streaming.generator import load_generator
from pikastream_jax.streaming.package import SHIPPED

pytestmark = pytest.mark.skipif(not SHIPPED.exists(), reason=f"the shipped weights are not at {SHIPPED}")

SPEECH = Path(__file__).parents[2] / "pikastream_jax" / "assets" / "speech"
SECONDS = 2.5


@pytest.fixture(scope="module")
def generator():
    return load_generator()


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    sound, rate = soundfile.read(sorted(SPEECH.glob("*.flac"))[0], stop=round(16_000 * SECONDS))
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    soundfile.write(path, sound, rate)
    return path


def serve(folder, speech, generator, *arguments):
    path = folder / "out.mp4"
    argv = ["--audio", str(speech), "--output", str(path), "--metrics", str(folder / "metrics.json"), *arguments]
    assert main(argv, lambda weights=None: generator) == 0
    return play(path)


def test_shipped_speech_and_avatar_become_a_moving_face(tmp_path, speech, generator):
    played = serve(tmp_path, speech, generator)
    assert played.frames.shape == (round(SECONDS * generator.fps), generator.height, generator.width, 3)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["reconstruction_psnr_db"] >= generator.psnr_warning  # the model knows its own avatars
    frames = played.frames.astype(np.float32)
    assert frames[0].std() > 10  # a picture
    assert np.abs(np.diff(frames, axis=0)).mean() > 0.05  # that moves
    other = serve(tmp_path, speech, generator, "--seed", "1").frames.astype(np.float32)
    assert np.abs(frames - other).mean() > 0.1  # and moves otherwise with another seed


def test_the_lips_follow_the_words_whatever_the_seed(generator):
    """A voice and a face no training has met: mouths open with the words and alike for two seeds, heads move each in its way."""
    speech = [subjects.read_speech(subjects.SPEECH)]
    scene = make_scene(subjects.HELD_OUT_IDENTITIES, subjects.NEUTRAL, speech, 0, samples_of(generator, 8))
    estimator, film = Estimator(), generated(generator)
    first, second = (estimator(film(dataclasses.replace(scene, seed=seed))) for seed in (0, 1))

    def agreement(a, b):
        return np.corrcoef(a, b)[0, 1]

    for reading in (first, second):
        assert agreement(reading.opening, scene.truth.opening) > 0.7
    assert agreement(first.opening, second.opening) > 0.8
    for name in ("yaw", "pitch", "roll"):
        assert agreement(getattr(first, name), getattr(second, name)) < 0.8, name


def test_in_silence_the_mouth_rests_and_the_face_lives(generator):
    speech = [np.zeros(16_000, np.float32)]
    scene = make_scene(subjects.HELD_OUT_IDENTITIES, subjects.NEUTRAL, speech, 0, samples_of(generator, 12))
    reading = Estimator()(generated(generator)(scene))
    assert np.mean(reading.opening) < 0.1
    assert np.std(reading.yaw) + np.std(reading.pitch) > 0.01  # radians


def test_serving_is_repeatable(tmp_path, speech, generator):
    first = serve(tmp_path, speech, generator, "--seed", "3").frames
    np.testing.assert_array_equal(first, serve(tmp_path, speech, generator, "--seed", "3").frames)
