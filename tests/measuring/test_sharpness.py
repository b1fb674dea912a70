"""Detail: 1 for the same pictures, lowered by blur, by noise and by too much contrast; split by hand."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pikastream_jax.measuring.images import luma
from pikastream_jax.measuring.sharpness import _bands, detail


@pytest.fixture(scope="module")
def truth():
    """Two pictures of discs and stripes with room for noise below 0 and above 255."""
    y, x = np.mgrid[:64, :64]
    disc = 80 + 90 * ((y - 30) ** 2 + (x - 25) ** 2 < 300) + 15 * (x % 8 < 4)
    return np.repeat(np.stack([disc, disc.T])[..., None], 3, axis=-1).astype(np.uint8)


def blurred(pictures, sigma):
    return np.round(gaussian_filter(pictures.astype(float), (0, sigma, sigma, 0))).astype(np.uint8)


def noisy(pictures, strength, seed=0):
    noise = np.random.default_rng(seed).normal(size=pictures.shape[:-1])[..., None]
    return np.clip(np.round(pictures + strength * noise), 0, 255).astype(np.uint8)


def test_the_same_pictures(truth):
    same = detail(truth, truth)
    assert (
        same.kept == pytest.approx(1)
        and same.invented == pytest.approx(0, abs=1e-12)
        and same.agreement == pytest.approx(1)
    )


def test_blur_lowers_what_is_kept_and_the_agreement(truth):
    figures = [detail(blurred(truth, sigma), truth) for sigma in (0.5, 1.0, 2.0)]
    for sharper, softer in zip(figures[:-1], figures[1:], strict=True):
        assert 1 > sharper.kept > softer.kept and 1 > sharper.agreement > softer.agreement


def test_noise_does_not_feign_detail(truth):
    """On true and on soft pictures: what is kept stays, what is invented rises, the agreement falls."""
    for base in (truth, blurred(truth, 1.0)):
        figures = [detail(noisy(base, strength), truth) for strength in (0, 4, 12)]
        for calm, loud in zip(figures[:-1], figures[1:], strict=True):
            assert loud.kept == pytest.approx(calm.kept, abs=0.03)
            assert loud.invented > calm.invented and loud.agreement < calm.agreement


def test_too_much_contrast_is_not_agreement(truth):
    strong = np.clip(80 + 1.4 * (truth.astype(float) - 80), 0, 255).astype(np.uint8)
    assert detail(strong, truth).kept > 1.2 and detail(strong, truth).agreement < 0.99


def test_the_split_by_hand(truth):
    output = noisy(blurred(truth, 1.0), 6)
    parts = []
    for mine, true in zip(_bands(luma(output)), _bands(luma(truth)), strict=True):
        slope = np.vdot(mine, true) / np.vdot(true, true)
        parts.append((slope, ((mine - slope * true) ** 2).sum() / (true**2).sum()))
    found = detail(output, truth)
    assert (found.kept, found.invented) == pytest.approx(tuple(np.mean(parts, axis=0)), rel=1e-6)
    np.testing.assert_allclose(
        sum(_bands(luma(truth))), luma(truth) - gaussian_filter(luma(truth), (0, 2, 2), mode="nearest"), atol=1e-9
    )


def test_what_cannot_be_compared(truth):
    with pytest.raises(ValueError, match="cannot be compared"):
        detail(truth, truth[:1])
    with pytest.raises(ValueError, match="no detail to compare with"):
        detail(truth, np.full_like(truth, 90))
