"""The shipped estimator, against the renderer's truth on people it has not met."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pikastream_jax.data.face import neutral_state
from pikastream_jax.measuring.estimator import Estimator, FaceEstimator, join
from pikastream_jax.measuring.subjects import film, person
from pikastream_jax.nn.layers import functional, parameter_count


@pytest.fixture(scope="module")
def faces(estimator):
    """Four people, twelve states each: the truth and what was read."""
    rng = np.random.default_rng(0)
    states, readings = [], []
    for seed in range(4):
        drawn = {
            "mouth_open": rng.uniform(0, 1, 12),
            "mouth_width": rng.uniform(-1, 1, 12),
            "smile": rng.uniform(-1, 1, 12),
            "yaw": rng.uniform(-0.2, 0.2, 12),
            "gaze_x": rng.uniform(-1, 1, 12),
        }
        state = dataclasses.replace(neutral_state(12), **{name: jnp.float32(value) for name, value in drawn.items()})
        states.append(state)
        readings.append(estimator(film(person(7_000_000 + seed), state)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *states), join(readings)


@pytest.mark.parametrize(("quantity", "least"), [("mouth_open", 0.97), ("smile", 0.95), ("yaw", 0.9), ("gaze_x", 0.9)])
def test_reads_what_was_drawn(faces, quantity, least):
    states, reading = faces
    read = reading.opening if quantity == "mouth_open" else getattr(reading, quantity)
    assert np.corrcoef(getattr(states, quantity), read)[0, 1] > least


def test_opening_has_the_right_scale(faces):
    states, reading = faces
    assert np.abs(states.mouth_open - reading.opening).mean() < 0.08


def test_reading_does_not_depend_on_the_other_pictures_of_the_call(estimator):
    frames = film(person(1), dataclasses.replace(neutral_state(12), mouth_open=jnp.linspace(0, 1, 12)))
    many = np.concatenate([frames] * 3)  # more than one batch
    assert estimator(many).opening[24:] == pytest.approx(estimator(frames).opening, abs=1e-4)


@pytest.mark.parametrize("size", [64, 512])
def test_another_size_is_brought_to_what_is_read(estimator, size):
    """Against Pillow's resizing of the same picture, on the 256 levels of its own."""
    picture = film(person(1), dataclasses.replace(neutral_state(1), mouth_open=jnp.asarray([0.6])), size)
    there = np.asarray(Image.fromarray(picture[0]).resize((256, 256), Image.Resampling.LANCZOS))
    assert estimator(picture).opening == pytest.approx(estimator(there[None]).opening, abs=0.03)


def test_is_small():
    assert parameter_count(functional(lambda rngs: FaceEstimator(rngs=rngs)).abstract) <= 500_000


def test_wrong_pictures_are_refused(estimator):
    with pytest.raises(ValueError, match="crop"):
        estimator(np.zeros((1, 256, 128, 3), np.uint8))
    with pytest.raises(ValueError, match="at least 64"):
        estimator(np.zeros((1, 48, 48, 3), np.uint8))
    with pytest.raises(ValueError, match="float32"):
        estimator(np.zeros((1, 256, 256, 3), np.float32))


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        Estimator(tmp_path / "nothing.safetensors")
