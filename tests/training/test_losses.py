"""Losses and image measures by hand, and against loops in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.training.losses import motion_loss, psnr, reconstruction_loss, region_weights


def test_psnr_by_hand():
    # Peak to peak is 2: an error of 0.2 everywhere is a tenth of it, 20 dB.
    np.testing.assert_allclose(psnr(jnp.array([4.0, 0.04, 4e-4])), [0.0, 20.0, 40.0], atol=1e-4)
    assert psnr(jnp.array(0.0)) == pytest.approx(10 * np.log10(4e10), abs=1e-3), "a perfect picture has a finite figure"


def test_region_weights_by_hand():
    boxes = jnp.array([[1.0, 1.0, 3.0, 4.0], [2.0, 3.0, 4.0, 9.0]])  # y0, x0, y1, x1; they overlap in one pixel
    assert region_weights(boxes, 4, 5, (6.0, 2.0)).tolist() == [
        [1, 1, 1, 1, 1],
        [1, 7, 7, 7, 1],
        [1, 7, 7, 9, 3],
        [1, 1, 1, 3, 3],
    ]


def test_an_edge_inside_a_pixel_counts_the_pixels_whose_corner_lies_inside():
    boxes = jnp.array([[0.5, 0.0, 2.5, 1.0]])
    assert region_weights(boxes, 4, 1, (1.0,))[:, 0].tolist() == [1, 2, 2, 1]


def test_a_crop_has_the_weights_of_its_place():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 8, (2, 3, 1, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(2, 6, corner.shape)], axis=-1).astype(np.float32)
    whole = region_weights(jnp.asarray(boxes), 16, 16, (3.0,))
    assert whole.shape == (2, 3, 16, 16)
    origin = jnp.array([[[2.0, 5.0]], [[7.0, 0.0]]])  # one per clip, for all its frames
    crop = region_weights(jnp.asarray(boxes), 6, 8, (3.0,), origin)
    np.testing.assert_array_equal(crop[0], whole[0, :, 2:8, 5:13])
    np.testing.assert_array_equal(crop[1], whole[1, :, 7:13, 0:8])


def loop64(output, target, weight):
    """One picture [h, w, c], pixel by pixel."""
    h, w, c = output.shape
    weight = weight / weight.mean()
    error = output - target
    pixel = sum(weight[y, x] * (abs(e) + 2 * e * e) for y in range(h) for x in range(w) for e in error[y, x]) / (h * w * c)
    vertical = [weight[y, x] * abs(error[y, x] - error[y - 1, x]) for y in range(1, h) for x in range(w)]
    horizontal = [weight[y, x] * abs(error[y, x] - error[y, x - 1]) for y in range(h) for x in range(1, w)]
    return pixel + 0.5 * (np.mean(vertical) + np.mean(horizontal))


def test_reconstruction_loss_by_hand():
    ones = jnp.ones((4, 4, 3))
    assert reconstruction_loss(ones, ones, jnp.ones((4, 4))) == 0
    # A constant error has no edges: 0.5 + 2 x 0.25.
    assert reconstruction_loss(ones, ones - 0.5, jnp.ones((4, 4))) == pytest.approx(1.0)


def test_reconstruction_loss_against_a_loop():
    rng = np.random.default_rng(1)
    output, target = rng.uniform(-1, 1, (2, 5, 6, 3))
    weight = rng.uniform(1, 9, (5, 6))
    value = reconstruction_loss(*(jnp.asarray(a, jnp.float32) for a in (output, target, weight)))
    assert value == pytest.approx(loop64(output, target, weight), rel=1e-5)
    scaled = reconstruction_loss(*(jnp.asarray(a, jnp.float32) for a in (output, target, 7 * weight)))
    assert scaled == pytest.approx(float(value), rel=1e-5), "only the proportions of the weights count"


def test_an_error_where_it_matters_costs_more():
    weight = region_weights(jnp.array([[1.0, 1.0, 3.0, 3.0]]), 8, 8, (6.0,))
    target = jnp.zeros((8, 8, 1))
    inside = reconstruction_loss(target.at[1, 1].set(0.5), target, weight)
    outside = reconstruction_loss(target.at[5, 5].set(0.5), target, weight)
    assert inside > 3 * outside


def test_motion_loss_by_hand():
    target = jnp.zeros((3, 2, 2, 1)).at[1:].set(0.6)  # one step of 0.6 between the first two of three frames
    still = jnp.full_like(target, 0.4)
    even = jnp.ones((3, 2, 2))
    assert motion_loss(target, target, even) == 0
    assert motion_loss(target + 0.3, target, even) == pytest.approx(0, abs=1e-6), "a constant offset is no motion"
    assert motion_loss(still, target, even) == pytest.approx((0.6 + 2 * 0.6**2) / 2), "0.6 in one of two steps"
    weight = even.at[:, 0, 0].set(5.0)
    moving = target.at[:, 0, 0].set(0.4)  # only the weighted pixel stands still: 5 of 8 weights, half of the steps
    assert motion_loss(moving, target, weight) == pytest.approx(5 / 8 * (0.6 + 2 * 0.6**2) / 2)
