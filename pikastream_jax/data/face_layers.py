"""The large, soft parts of the picture: background, clothes, neck, head, hair.

Each function lays its part over the colour planes drawn so far. ``soft`` is the width of an anti-aliased edge, about
one pixel and a half in picture units.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pikastream_jax.data import face_shapes as shapes
from pikastream_jax.data.face_identity import Identity
from pikastream_jax.data.face_pose import FaceState, Pose
from pikastream_jax.data.face_shapes import Colour, Plane, blob, cover, ellipse, over, smooth, squircle, tint

_SHADOW = (0.80, 0.66, 0.62)  # skin in the shade turns warm, not grey
_NECK_BASE = 0.60  # y where the neck meets the shoulders


class Outline(NamedTuple):
    """Signed distances that several layers share."""

    head: Plane
    hair: Plane
    side: Plane  # +1 right of the middle of the face, -1 left
    mirrored: Plane  # |u|


def outline(identity: Identity, state: FaceState, pose: Pose) -> Outline:
    """The silhouettes of head and hair."""
    i = identity
    # The chin stands out towards where the head turns; the lower half narrows to the jaw.
    down = jnp.clip(pose.y * (1.0 / i.head_height), 0.0, 1.1)
    x = pose.x - (0.06 * jnp.sin(state.yaw)) * down * down
    width = i.head_width * (1.0 - (1.0 - i.jaw) * down * down)
    head = squircle(x, pose.y, width, i.head_height * (1.0 + 0.12 * jnp.sin(state.pitch) * down), i.squareness)

    top = -i.head_height - i.hair_top
    bottom = jnp.maximum(i.hair_bottom, 0.0)
    middle = 0.5 * (top + bottom)
    # Hair trails a turning head a little, and swept hair piles up on its side.
    swept = pose.x + 0.04 * jnp.sin(state.yaw) - 0.30 * i.line_slope * jnp.maximum(-0.25 - pose.y, 0.0)
    hair = squircle(swept, pose.y - middle, i.head_width + i.hair_side, bottom - middle, i.hair_square)
    waves = shapes.scallops(3.4 * pose.x + 1.5 * pose.y) * shapes.scallops(3.0 * pose.y - 1.1 * pose.x)
    hair = hair - i.curl * waves + 10.0 * (1.0 - i.hair)
    return Outline(head, hair, jnp.sign(pose.u), jnp.abs(pose.u))


def draw_background(identity: Identity, px: Plane, py: Plane) -> Colour:
    """A soft vertical gradient with a glow behind the head."""
    i = identity
    down = 0.5 * py + 0.5
    glow = 0.8 * blob(px - 0.1, py + 0.15, 1.25, 1.15)
    ground = tuple(i.background_top[c] + (i.background_bottom[c] - i.background_top[c]) * down for c in range(3))
    return over(ground, i.background_glow, glow)


def draw_back_hair(under: Colour, identity: Identity, pose: Pose, lines: Outline, soft: float) -> Colour:
    """What lies behind the head: bun, bunches, long hair."""
    i = identity
    top = -i.head_height - i.hair_top
    bun = ellipse(pose.x, pose.y - top + 0.03, 0.155, 0.135) + 10.0 * (1.0 - i.bun)
    puffs = ellipse(jnp.abs(pose.x) - i.head_width - 0.10, pose.y + 0.30, 0.185, 0.185) + 10.0 * (1.0 - i.puffs)
    ball = jnp.minimum(bun, puffs)
    canvas = over(under, i.hair_color * 0.9, cover(ball, soft))
    shine = blob(jnp.abs(pose.x + 0.03 * i.bun) - i.puffs * (i.head_width + 0.08), pose.y - i.bun * (top - 0.07)
                 + i.puffs * 0.36, 0.13, 0.09)  # fmt: skip
    canvas = over(canvas, i.hair_color * 0.6 + 0.4, 0.35 * shine * cover(ball, soft))
    behind = cover(lines.hair, soft)
    return tint(over(canvas, i.hair_color, behind), (0.68, 0.66, 0.68), behind * smooth(pose.y, -0.25, 0.18))


def draw_body(under: Colour, identity: Identity, state: FaceState, px: Plane, py: Plane, pose: Pose, lines: Outline,
              soft: float) -> Colour:  # fmt: skip
    """Neck, shoulders and clothes; the chin throws a soft shadow on the neck."""
    i = identity
    x = px - 1.2 * state.shift_x
    y = py - state.shift_y * 1.2 + 0.010 * state.breath
    # The neck leans from the shoulders to the head.
    lean = (px - pose.x - 1.2 * state.shift_x) * smooth(y, _NECK_BASE + 0.1, 0.25)
    flare = jnp.maximum(y - 0.48, 0.0)
    neck = jnp.abs(x - 0.8 * lean) - i.neck_width - 1.6 * flare * flare - 0.25 * flare
    body = squircle(x, y - 1.36, i.shoulder_width, 1.36 - _NECK_BASE - 0.02, 0.35)
    skin = jnp.minimum(jnp.maximum(neck, jnp.maximum(0.1 - y, y - 0.70)), body + 0.02)
    canvas = over(under, i.skin * 0.96, cover(skin, soft))
    canvas = tint(canvas, _SHADOW, 0.75 * smooth(lines.head, 0.17, -0.02) * cover(skin, soft))

    round_neck = ellipse(x, y - _NECK_BASE - 0.01, i.neck_width + 0.07, 0.06 + i.neckline)
    pointed = (jnp.abs(x) - (i.neck_width + 0.07) * (1.0 - (y - _NECK_BASE) * (1.0 / (0.14 + 1.3 * i.neckline)))) * 0.75
    opening = round_neck + (pointed - round_neck) * i.neckline_v
    opening = jnp.maximum(opening, 10.0 * i.turtleneck - 5.0)
    roll_collar = jnp.maximum(neck - 0.022, jnp.maximum(0.475 - y, y - 0.72)) + 10.0 * (1.0 - i.turtleneck)
    cloth = jnp.minimum(jnp.maximum(body, -opening), roll_collar)
    alpha = cover(cloth, soft)
    canvas = over(canvas, i.clothes_color, alpha)
    band = jnp.minimum(opening - 0.045, jnp.maximum(roll_collar, y - 0.60))
    canvas = over(canvas, i.collar_color, alpha * cover(band, soft))
    shade = (0.80, 0.78, 0.80)
    canvas = tint(canvas, shade, alpha * 0.8 * smooth(jnp.abs(x), 0.35, 1.0))
    return tint(canvas, shade, 0.6 * alpha * smooth(lines.head, 0.20, 0.0))


def draw_head(under: Colour, identity: Identity, state: FaceState, pose: Pose, lines: Outline, soft: float) -> Colour:
    """Ears and the skin of the face, shaded as a rounded form lit from the upper left."""
    i = identity
    facing = jnp.sin(1.72 + lines.side * state.yaw)  # the far ear goes behind the head
    ear_x = jnp.abs(pose.x) - i.head_width * facing * 1.01
    ear_y = pose.y - 0.055
    ear = ellipse(ear_x, ear_y, 0.62 * i.ear_size, i.ear_size)
    canvas = over(under, i.skin * jnp.asarray([0.95, 0.88, 0.86]), cover(ear, soft))
    canvas = tint(canvas, _SHADOW, 0.9 * blob(ear_x - 0.012, ear_y, 0.42 * i.ear_size, 0.72 * i.ear_size))
    ring = ellipse(ear_x - 0.012, ear_y - i.ear_size - 0.012, 0.018, 0.018) + 10.0 * (1.0 - i.earrings)
    canvas = over(canvas, jnp.asarray([0.95, 0.80, 0.42]), cover(ring, soft))

    on_face = cover(lines.head, soft)
    light = (-0.40 / i.head_width) * pose.x - (0.38 / i.head_height) * pose.y + 0.85 * pose.z
    face = over(canvas, i.skin, on_face)
    face = tint(face, _SHADOW, 0.85 * on_face * smooth(light, 0.62, -0.25))
    u, v, m = pose.u, pose.v, lines.mirrored
    bright = jnp.minimum(1.12 * i.skin + 0.10, 1.0)
    face = over(face, bright, 0.75 * on_face * blob(u + 0.10, v + 0.27, 0.28, 0.17))
    blush = (1.02, 0.74, 0.70)
    happy = jnp.maximum(state.smile, 0.0)
    face = tint(face, blush, 0.62 * i.freshness * blob(m - 0.235, v - 0.20 + 0.02 * happy, 0.15, 0.115))
    face = over(face, bright, 0.50 * blob(m - 0.20, v - 0.125 + 0.02 * happy, 0.11, 0.055))
    # Soft sockets give the eyes a place; the cheek fold appears with a smile, and stays with age.
    face = tint(face, _SHADOW, 0.30 * on_face * blob(m - i.eye_spacing + 0.03, v - i.eye_y + 0.05, 0.15, 0.11))
    fold_at = i.mouth_size + 0.065 + 0.10 * (v - i.mouth_y)
    fold = jnp.abs(m - fold_at - 1.4 * (v - i.mouth_y + 0.06) ** 2) - 0.004
    fold_strength = jnp.clip(0.30 * happy + 0.30 * smooth(i.age, 0.55, 0.8), 0.0, 0.5)
    fold_place = blob(m - fold_at, v - i.mouth_y + 0.06, 0.10, 0.085)
    face = tint(face, _SHADOW, fold_strength * fold_place * cover(fold, 4.0 * soft))
    old = smooth(i.age, 0.55, 0.8)
    lines_y = jnp.abs(v + 0.235 - 0.3 * u * u) - 0.028
    wrinkles = cover(jnp.abs(lines_y) - 0.003, 3.0 * soft) * blob(u, v + 0.23, 0.24, 0.12)
    raised = 0.35 * jnp.maximum(state.brow_raise, 0.0)
    return tint(face, _SHADOW, jnp.minimum(0.45 * old + raised, 0.6) * wrinkles)


def draw_beard(under: Colour, identity: Identity, pose: Pose, lines: Outline, soft: float) -> Colour:
    """A beard along the jaw, open around the mouth."""
    i = identity
    edge = i.mouth_y - 0.045 - 1.9 * jnp.maximum(lines.mirrored - 0.10, 0.0) ** 2 - 0.10 * lines.mirrored
    chin = jnp.maximum(edge - pose.v, lines.head - 0.012)
    around = ellipse(pose.u, pose.v - i.mouth_y - 0.005, i.mouth_size * 1.18, 0.085)
    shape = jnp.maximum(chin, -around)
    alpha = i.beard * cover(shape, 5.0 * soft) * cover(lines.head, soft)
    canvas = over(under, 0.80 * i.hair_color + 0.12 * i.skin, alpha)
    return tint(canvas, (0.66, 0.63, 0.63), alpha * smooth(pose.y + 0.35 * pose.x, 0.20, 0.60))


def draw_front_hair(under: Colour, identity: Identity, state: FaceState, pose: Pose, lines: Outline,
                    soft: float) -> Colour:  # fmt: skip
    """Hair above the hair line and beside the face, with a soft highlight."""
    i = identity
    u, v = pose.u, pose.v
    away = u - i.part_x
    curtain = i.part_drop * (jnp.sqrt(away * away + 0.004) - 0.063)
    sideburn = 3.2 * jnp.maximum(lines.mirrored - 0.80 * i.head_width, 0.0)
    line = i.line_height + i.line_slope * u + i.line_curve * u * u + curtain + sideburn
    locks = shapes.scallops(4.6 * (u - 0.6 * i.line_slope * v) + 0.25)
    above = (v - line) * 0.8 - 0.010 * locks * (1.0 + 40.0 * i.curl)
    above = jnp.maximum(above, v - i.line_side)
    panel = i.panel - lines.mirrored - 0.06 * smooth(pose.y, 0.05, 0.5)
    hair = jnp.maximum(lines.hair, shapes.lower(above, panel, 0.05))
    alpha = cover(hair, soft)
    # The hair throws a narrow shadow on the forehead.
    canvas = tint(under, _SHADOW, 0.55 * smooth(hair, 0.06, -0.01) * cover(lines.head, soft) * i.hair)
    canvas = over(canvas, i.hair_color, alpha)
    strands = shapes.scallops(3.1 * away * (1.25 - 0.7 * pose.y) + 0.8 * pose.y) * shapes.scallops(
        1.7 * away - 0.7 * pose.y
    )
    canvas = tint(canvas, (0.72, 0.70, 0.72), alpha * (smooth(pose.y + 0.35 * pose.x, -0.40, 0.35) - 0.22 * strands))
    crown = -i.head_height - 0.35 * i.hair_top
    arc = pose.y - crown - 0.13 - 0.55 * pose.x * pose.x
    shine = blob(pose.x + 0.12, arc, 0.30, 0.055)
    return over(canvas, i.hair_color * 0.55 + 0.45, 0.45 * alpha * shine)
