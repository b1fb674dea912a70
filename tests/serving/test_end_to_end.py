"""The shipped model behind the command line: the only tests here that do not use the fake generator."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from media import play

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
    assert played.frames.shape == (round(SECONDS * generator.fps), generator.size, generator.size, 3)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["reconstruction_psnr_db"] >= generator.psnr_warning  # the model knows its own avatars
    frames = played.frames.astype(np.float32)
    assert frames[0].std() > 10  # a picture
    assert np.abs(np.diff(frames, axis=0)).mean() > 0.05  # that moves
    other = serve(tmp_path, speech, generator, "--seed", "1").frames.astype(np.float32)
    assert np.abs(frames - other).mean() > 0.1  # and moves otherwise with another seed


def test_serving_is_repeatable(tmp_path, speech, generator):
    first = serve(tmp_path, speech, generator, "--seed", "3").frames
    np.testing.assert_array_equal(first, serve(tmp_path, speech, generator, "--seed", "3").frames)
