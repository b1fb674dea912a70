"""How much of a picture's fine detail is there, in a way that noise cannot feign.

Detail is what two band-passes of the luma keep (differences of Gaussians at 0 and 1, and at 1 and 2 pixels). The detail of an output is
split by least squares into the truth's detail, times a factor, and what is perpendicular to it:

    output = kept x truth + rest,    kept = <output, truth> / <truth, truth>,    invented = <rest, rest> / <truth, truth>

so that the energy of its detail relative to the truth's is kept^2 + invented. The energy alone, the usual measure of sharpness, is raised
by blocking and noise as well as by edges. `agreement` = 2 <output, truth> / (<output, output> + <truth, truth>) puts both parts into one
number: 1 only where the detail is the truth's, less for any blur, for contrast that is exaggerated, and for anything added that has nothing to
do with the truth. A regression that answers with the mean of what it is unsure of comes out soft: `kept` low, `invented` low. A
decoder that makes up texture has a high `invented`. So the price of sharpness shows.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import gaussian_filter1d

from pikastream_jax.measuring.images import luma

_SCALES = (0.0, 1.0, 2.0)  # pixels, standard deviations of the Gaussians


@dataclasses.dataclass(frozen=True)
class Detail:
    """Fine detail against the truth's, the mean over the bands."""

    kept: float  # share of the true detail that is there: 1 is all of it
    invented: float  # energy of detail that the truth does not have, relative to the truth's
    agreement: float  # -1 .. 1; 1 where both are the same


def detail(output: UInt8[np.ndarray, "*b h w 3"], truth: UInt8[np.ndarray, "*b h w 3"]) -> Detail:
    """Measures pictures against the true ones, pooled over all of them.

    Raises:
      ValueError: the shapes differ, or the truth has no detail at all.
    """
    if output.shape != truth.shape:
        raise ValueError(
            f"pictures of shapes {list(output.shape)} and {list(truth.shape)} cannot be compared: bring them to one size"
        )
    parts = []
    for mine, true in zip(_bands(luma(output)), _bands(luma(truth)), strict=True):
        energy, own, common = (true * true).sum(), (mine * mine).sum(), (mine * true).sum()
        if energy < 1e-6 * true.size:
            raise ValueError("the true pictures are flat: there is no detail to compare with")
        kept = common / energy
        parts.append((kept, own / energy - kept**2, 2 * common / (own + energy)))
    return Detail(*(float(figure) for figure in np.mean(parts, axis=0)))


def _bands(grey: Float[np.ndarray, "*b h w"]) -> list[Float[np.ndarray, "*b h w"]]:
    smooth = [_blur(grey, sigma) for sigma in _SCALES]
    return [fine - coarse for fine, coarse in zip(smooth[:-1], smooth[1:], strict=True)]


def _blur(grey: Float[np.ndarray, "*b h w"], sigma: float) -> Float[np.ndarray, "*b h w"]:
    if not sigma:
        return grey
    return gaussian_filter1d(gaussian_filter1d(grey, sigma, axis=-1, mode="nearest"), sigma, axis=-2, mode="nearest")
