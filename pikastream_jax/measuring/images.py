"""Measures of pictures, in NumPy on 8-bit values: PSNR, SSIM, CIE Lab."""

import numpy as np
from jaxtyping import Float, Num, UInt8
from scipy.ndimage import correlate1d

_LUMA = np.asarray([0.299, 0.587, 0.114])  # ITU-R BT.601
_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5  # an 11x11 window, as in the paper
# sRGB (IEC 61966-2-1) to XYZ, and the white point D65.
_TO_XYZ = np.asarray([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = np.asarray([0.95047, 1.0, 1.08883])


def psnr(a: UInt8[np.ndarray, "*b"], b: UInt8[np.ndarray, "*b"]) -> float:
    """Peak signal-to-noise ratio in dB over all values together, peak 255; 99 where nothing differs.

    Raises:
      ValueError: the shapes differ.
    """
    return psnr_of_error(squared_error(a, b).mean())


def squared_error(a: UInt8[np.ndarray, "*b"], b: UInt8[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """Squared differences of 8-bit values."""
    _same_shape(a, b)
    return (a.astype(np.float32) - b.astype(np.float32)) ** 2


def psnr_of_error(mean_squared_error: float) -> float:
    """dB of a mean squared error of 8-bit values, at most 99."""
    return float(min(99.0, 10.0 * np.log10(255.0**2 / max(float(mean_squared_error), 1e-12))))


def luma(pictures: UInt8[np.ndarray, "*b 3"]) -> Float[np.ndarray, "*b"]:
    """BT.601 luma of sRGB pictures, 0 .. 255."""
    return pictures.astype(np.float64) @ _LUMA


def ssim_map(a: Num[np.ndarray, "*b h w"], b: Num[np.ndarray, "*b h w"]) -> Float[np.ndarray, "*b i j"]:
    """Structural similarity of grey pictures (0 .. 255) at every place whose 11x11 Gaussian window lies inside.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", 2004: sigma 1.5, K1 0.01, K2 0.03.

    Returns:
      The map, 5 pixels smaller than the pictures on every side.

    Raises:
      ValueError: the shapes differ, or the pictures are smaller than 11x11.
    """
    _same_shape(a, b)
    if min(a.shape[-2:]) < 2 * _SSIM_RADIUS + 1:
        raise ValueError(f"ssim needs pictures of 11x11 at least, got {a.shape[-2]}x{a.shape[-1]}: take a larger part")
    offset = np.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1)
    window = np.exp(-0.5 * (offset / _SSIM_SIGMA) ** 2)
    window /= window.sum()
    r = _SSIM_RADIUS

    def mean(x):
        return correlate1d(correlate1d(x, window, axis=-1), window, axis=-2)[..., r:-r, r:-r]

    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    )


def ssim(a: UInt8[np.ndarray, "*b h w 3"], b: UInt8[np.ndarray, "*b h w 3"]) -> float:
    """Mean structural similarity of the luma of sRGB pictures."""
    return float(ssim_map(luma(a), luma(b)).mean())


def lab(pictures: Num[np.ndarray, "*b 3"]) -> Float[np.ndarray, "*b 3"]:
    """CIE L*a*b* (D65) of sRGB values 0 .. 255. A distance of 1 is about what an eye can just tell apart."""
    rgb = np.asarray(pictures, np.float64) / 255.0
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _same_shape(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"pictures of shapes {list(a.shape)} and {list(b.shape)} cannot be compared: bring them to one size"
        )
