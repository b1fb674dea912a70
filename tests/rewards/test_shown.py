"""What rewards look at: the middle square at 128x128, antialiased and differentiable, and shapes that belong together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.rewards import Shown, canonical


def test_pictures_of_the_size_are_left_alone():
    video = jax.random.normal(jax.random.key(0), (2, 3, 128, 128, 3))
    np.testing.assert_array_equal(canonical(video), video)


def test_twice_the_size_is_resampled_by_a_triangle_of_two_pixels():
    """Half the size: weights 1/8, 3/8, 3/8, 1/8 each way, the textbook antialiased linear filter."""
    picture = np.random.default_rng(0).normal(size=(256, 256, 3)).astype(np.float32)
    made = np.asarray(canonical(jnp.asarray(picture)))
    rows = sum(w * picture[1 + d : 253 + d : 2] for d, w in zip((0, 1, 2, 3), (1, 3, 3, 1), strict=True)) / 8  # rows 1 to 126
    both = sum(w * rows[:, 1 + d : 253 + d : 2] for d, w in zip((0, 1, 2, 3), (1, 3, 3, 1), strict=True)) / 8
    np.testing.assert_allclose(made[1:127, 1:127], both, atol=1e-5)


def test_of_a_wide_picture_the_middle_square_is_seen():
    picture = np.full((1, 480, 832, 3), -1.0, np.float32)
    picture[:, :, 176:656] = 1.0  # the middle 480 columns
    np.testing.assert_allclose(canonical(picture), 1.0, atol=1e-5)
    picture[:, :, 400:432] = 0.5
    seen = np.asarray(canonical(picture))
    assert seen.shape == (1, 128, 128, 3)
    dark = np.flatnonzero(seen[0, 64, :, 0] < 0.99)
    assert (dark.min(), dark.max()) == (59, 68)  # columns 224 to 256 of 480, times 128 / 480, and half of the filter


def test_a_fine_pattern_becomes_its_mean_and_every_pixel_counts():
    y, x = np.mgrid[:512, :512]
    board = np.where((y + x) % 2, 1.0, -1.0)[..., None].repeat(3, -1)
    np.testing.assert_allclose(canonical(jnp.asarray(board)), 0.0, atol=1e-2)
    gradient = jax.grad(lambda picture: canonical(picture).mean())(jnp.asarray(board))
    assert (gradient > 0).all()
    assert float(gradient.sum()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("video", "reference", "mel", "says"),
    [
        ((1, 8, 256, 256, 3), (1, 128, 128, 3), (1, 2, 16, 4), "canonical"),
        ((1, 8, 128, 128, 3), (2, 128, 128, 3), (1, 2, 16, 4), "canonical"),
        ((1, 8, 128, 128, 3), (1, 128, 128, 3), (1, 3, 16, 4), "mel"),
        ((1, 7, 128, 128, 3), (1, 128, 128, 3), (1, 1, 16, 4), "whole latent frames"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(video, reference, mel, says):
    with pytest.raises(ValueError, match=says):
        Shown(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (video, reference, mel))).check()
