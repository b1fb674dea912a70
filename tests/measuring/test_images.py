import numpy as np
import pytest

from pikastream_jax.measuring.images import lab, luma, psnr, ssim, ssim_map


def test_psnr_of_a_known_error():
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr(a, a + 1) == pytest.approx(48.1308, abs=1e-4)  # 20 log10 255
    half = a.copy()
    half[:2] = 10
    assert psnr(a, half) == pytest.approx(10 * np.log10(255**2 / 50))


def test_psnr_of_equal_pictures_is_finite():
    a = np.full((2, 2, 3), 7, np.uint8)
    assert psnr(a, a) == 99.0


def test_psnr_refuses_pictures_of_different_shapes():
    with pytest.raises(ValueError, match="one size"):
        psnr(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8))


def test_ssim_equals_its_definition_at_one_place():
    """The weighted sums of the paper, written out for the middle of an 11x11 picture."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 255, (2, 11, 11))
    offset = np.arange(-5, 6)
    weight = np.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
    var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
    cov = (weight * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = 6.5025, 58.5225
    expected = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    result = ssim_map(a, b)
    assert result.shape == (1, 1)
    assert result[0, 0] == pytest.approx(expected, rel=1e-9)


def test_ssim_of_flat_pictures_compares_brightness_alone():
    a, b = np.full((16, 16), 100.0), np.full((16, 16), 120.0)
    assert ssim_map(a, b) == pytest.approx((2 * 100 * 120 + 6.5025) / (100**2 + 120**2 + 6.5025))


def test_ssim_falls_with_noise_and_is_one_without():
    rng = np.random.default_rng(1)
    a = np.repeat(np.repeat(rng.integers(0, 256, (2, 6, 6, 3)), 5, axis=1), 5, axis=2).astype(np.uint8)
    noise = rng.integers(-30, 31, a.shape)
    values = [ssim(a, np.clip(a + noise * s, 0, 255).astype(np.uint8)) for s in (0, 0.3, 1)]
    assert values[0] == pytest.approx(1.0)
    assert values[0] > values[1] > values[2]


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(ValueError, match="11x11"):
        ssim_map(np.zeros((10, 20)), np.zeros((10, 20)))


def test_luma_of_white_and_red():
    assert luma(np.asarray([[255, 255, 255], [255, 0, 0]], np.uint8)) == pytest.approx([255, 76.245])


@pytest.mark.parametrize(
    ("rgb", "expected"),
    # Published values of the sRGB primaries under D65.
    [((255, 255, 255), (100, 0, 0)), ((0, 0, 0), (0, 0, 0)), ((255, 0, 0), (53.24, 80.09, 67.20)), ((0, 0, 255), (32.30, 79.19, -107.86))],
)  # fmt: skip
def test_lab_of_known_colours(rgb, expected):
    assert lab(np.asarray(rgb)) == pytest.approx(expected, abs=0.05)
