"""Signed distances and coverage: the few drawing primitives of the procedural face.

Everything works on planes (arrays ``[h, w]`` of coordinates or values) in picture units, where the picture spans
``[-1, 1]`` in both directions, x to the right and y down. A signed distance is negative inside a shape. Distances are
first-order estimates (implicit function over the length of its gradient), which is exact enough where it counts,
within a pixel or two of the edge.
"""

import jax.numpy as jnp
from jax import lax

Plane = jnp.ndarray
Colour = tuple[Plane, Plane, Plane]


def cover(distance: Plane, softness: float | Plane) -> Plane:
    """Coverage 0..1 of a shape with signed ``distance``, its edge ``softness`` wide (same unit as the distance)."""
    return jnp.clip(0.5 - distance * (1.0 / softness), 0.0, 1.0)


def ellipse(x: Plane, y: Plane, rx: Plane, ry: Plane) -> Plane:
    """Signed distance to the ellipse of radii ``rx``, ``ry`` around the origin."""
    return squircle(x, y, rx, ry, 0.0)


def squircle(x: Plane, y: Plane, rx: Plane, ry: Plane, squareness: float | Plane) -> Plane:
    """Signed distance to p^2 + q^2 - k p^2 q^2 = 1: an ellipse for k = 0, nearly a rectangle for k = 1."""
    ix, iy = 1.0 / rx, 1.0 / ry
    p, q = x * ix, y * iy
    pp, qq = p * p, q * q
    px, qy = p * (1.0 - squareness * qq) * ix, q * (1.0 - squareness * pp) * iy
    inverse_slope = 0.5 * lax.rsqrt(px * px + qy * qy + 0.01)
    return (pp + qq - squareness * jnp.minimum(pp, 1.0) * jnp.minimum(qq, 1.0) - 1.0) * inverse_slope


def blob(x: Plane, y: Plane, rx: Plane, ry: Plane) -> Plane:
    """A soft spot: 1 at the origin, falling smoothly to 0 at the ellipse of radii ``rx``, ``ry``."""
    p, q = x * (1.0 / rx), y * (1.0 / ry)
    inside = jnp.maximum(1.0 - p * p - q * q, 0.0)
    return inside * inside


def lower(a: Plane, b: Plane, rounding: float) -> Plane:
    """The smaller of two distances (the union of two shapes), with the corner between them rounded."""
    gap = a - b
    return 0.5 * (a + b - jnp.sqrt(gap * gap + rounding * rounding))


def scallops(turns: Plane) -> Plane:
    """A periodic row of round bumps: 1 at whole ``turns``, -1 in the creases halfway between; cheaper than a sine."""
    fraction = turns - jnp.round(turns)
    return 1.0 - 8.0 * fraction * fraction


def smooth(x: Plane, low: float | Plane, high: float | Plane) -> Plane:
    """Hermite step from 0 at ``low`` to 1 at ``high`` (``low`` may exceed ``high`` for a falling step)."""
    t = jnp.clip((x - low) * (1.0 / (high - low)), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def over(under: Colour, colour, alpha: Plane) -> Colour:
    """``colour`` (three planes, or an array of three channels) laid over ``under`` with opacity ``alpha``."""
    return tuple(u + (colour[i] - u) * alpha for i, u in enumerate(under))


def tint(under: Colour, factor, alpha: Plane) -> Colour:
    """Multiply ``under`` by ``factor`` (three channels) where ``alpha`` is 1, leave it alone where 0."""
    return tuple(u * (1.0 + (factor[i] - 1.0) * alpha) for i, u in enumerate(under))
