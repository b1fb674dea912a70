"""The small, sharp parts of the face: eyes, brows, glasses, nose and mouth.

They are drawn on patches of the picture around the eyes and around the mouth, because they are where the operations
are. Left and right are drawn at once on mirrored coordinates.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pikastream_jax.data.face_identity import Identity
from pikastream_jax.data.face_pose import FaceState, Pose
from pikastream_jax.data.face_shapes import Colour, Plane, blob, cover, ellipse, over, smooth, squircle, tint

_SHADOW = (0.80, 0.66, 0.62)
MAX_OPENING = 0.13  # of the height of the face
_UPPER_SHARE = 0.28  # of the opening lies above the lip line, the rest below: the jaw drops


class MouthShape(NamedTuple):
    """Measures of the mouth on the frontal face, in picture units."""

    half_width: Plane
    opening: Plane  # distance of the lips' inner edges in the middle
    corner_lift: Plane  # height of the corners above the middle of the lip line
    upper: Plane  # thickness of the lips
    lower: Plane


def mouth_shape(identity: Identity, state: FaceState) -> MouthShape:
    """The mouth that ``state`` makes on this face; the smile moves the corners, never the opening."""
    spread, purse = jnp.maximum(state.mouth_width, 0.0), jnp.maximum(-state.mouth_width, 0.0)
    happy, sad = jnp.maximum(state.smile, 0.0), jnp.maximum(-state.smile, 0.0)
    half = identity.mouth_size * (1.0 + 0.16 * spread - 0.42 * purse + 0.20 * happy - 0.05 * sad)
    opening = MAX_OPENING * 2.0 * identity.head_height * jnp.clip(state.mouth_open, 0.0, 1.0)
    stretch = 1.0 - 0.10 * happy - 0.10 * spread + 0.25 * purse
    lift = 0.010 + 0.055 * happy - 0.052 * sad
    return MouthShape(half, opening, lift, identity.lip_upper * stretch, identity.lip_lower * stretch)


def draw_mouth(under: Colour, identity: Identity, state: FaceState, pose: Pose, soft: float) -> Colour:
    """Lips, and between them teeth and tongue in the dark."""
    i, shape = identity, mouth_shape(identity, state)
    u, v = pose.u, pose.v - i.mouth_y
    s = u * (1.0 / shape.half_width)
    ss = jnp.minimum(s * s, 2.0)
    arch = 1.0 - ss  # 1 in the middle, 0 at the corners, negative beyond them
    full = arch * (1.0 + 0.45 * ss)
    line = -shape.corner_lift * (ss - 0.35)
    upper_edge = line - _UPPER_SHARE * shape.opening * full
    lower_edge = line + (1.0 - _UPPER_SHARE) * shape.opening * full
    bow = 0.80 + 0.55 * jnp.minimum(4.0 * ss, 1.0) - 0.2 * ss
    lip_top = upper_edge - shape.upper * arch * bow
    lip_bottom = lower_edge + shape.lower * arch * (1.0 + 0.25 * ss)

    # The soft shadow below the lower lip, and the moustache, move with the lips.
    canvas = tint(under, _SHADOW, 0.5 * blob(u, v - shape.lower - (1.0 - _UPPER_SHARE) * shape.opening - 0.035,
                                            0.8 * i.mouth_size, 0.035) * (1.0 - i.beard))  # fmt: skip
    m = jnp.abs(u)
    stache_y = v + 0.036 + shape.upper * 0.6 + _UPPER_SHARE * shape.opening - 0.9 * m * m
    stache = ellipse(u, stache_y + 0.012 * smooth(m, 0.03, 0.0), 1.12 * shape.half_width, 0.036)
    canvas = over(canvas, i.hair_color * 0.82, i.moustache * cover(stache, 2.0 * soft))

    lips = jnp.maximum(lip_top - v, v - lip_bottom)
    on_lips = cover(lips, soft)
    canvas = over(canvas, i.lip_color, on_lips)
    canvas = tint(canvas, (0.86, 0.80, 0.82), on_lips * cover(v - line, 2.0 * soft))
    gleam = blob(u + 0.2 * shape.half_width, v - 0.5 * (lower_edge + lip_bottom) + 0.003, 0.35 * shape.half_width,
                 0.35 * shape.lower)  # fmt: skip
    canvas = over(canvas, 0.5 * i.lip_color + 0.5, 0.5 * on_lips * gleam)
    # The lip line reaches a little beyond the lips and ends in soft corners.
    crease = jnp.abs(v - line) - 0.0055
    reach = smooth(jnp.abs(s), 1.10, 0.98)
    canvas = over(canvas, i.lip_color * jnp.asarray([0.50, 0.38, 0.40]), 0.85 * reach * cover(crease, soft))

    inside = cover(jnp.maximum(upper_edge - v, v - lower_edge) + 0.25 * soft, soft) * smooth(arch, 0.0, 0.04)
    deep = smooth(v, -0.02, 0.10)
    hollow = (0.26 + 0.10 * deep, 0.07 + 0.03 * deep, 0.09 + 0.03 * deep)
    cavity = over(canvas, hollow, inside)
    opening = shape.opening
    show = smooth(opening, 0.018, 0.045)
    tongue_y = (1.0 - _UPPER_SHARE) * opening - 0.012 - 0.4 * opening * state.tongue
    tongue = ellipse(u, v - line - tongue_y - 0.02, 0.62 * shape.half_width, 0.028 + 0.18 * opening)
    tongue_alpha = jnp.clip(0.55 * smooth(opening, 0.03, 0.09) + state.tongue, 0.0, 1.0) * show
    cavity = over(cavity, jnp.asarray([0.80, 0.36, 0.38]), inside * tongue_alpha * cover(tongue, 2.5 * soft))
    teeth_edge = line - _UPPER_SHARE * opening + jnp.minimum(0.033, 0.33 * opening) * (1.0 - 0.35 * ss)
    teeth = jnp.maximum(v - teeth_edge, jnp.abs(u) - 0.86 * shape.half_width)
    teeth_shade = jnp.asarray([0.97, 0.96, 0.92])
    cavity = over(cavity, teeth_shade, inside * show * cover(teeth, 1.5 * soft))
    low_edge = line + (1.0 - _UPPER_SHARE) * opening - 0.014 + 0.020 * ss
    low_teeth = jnp.maximum(low_edge - v, jnp.abs(u) - 0.55 * shape.half_width)
    low_show = 0.7 * smooth(opening, 0.06, 0.10) * (1.0 - state.tongue)
    return over(cavity, teeth_shade * 0.92, inside * low_show * cover(low_teeth, 1.5 * soft))


def draw_nose(under: Colour, identity: Identity, state: FaceState, pose: Pose, soft: float) -> Colour:
    """A rounded tip with wings and nostrils; it stands out, so it moves more than the face when the head turns."""
    i = identity
    # Height above the face grows from the root between the eyes to the tip.
    out = 0.13 * smooth(pose.v, i.eye_y - 0.03, i.nose_y)
    u, v = pose.u - out * jnp.sin(state.yaw), pose.v - i.nose_y - 0.13 * jnp.sin(state.pitch)
    m = jnp.abs(u)
    canvas = tint(under, _SHADOW, 0.38 * blob(u - 0.9 * i.nose_width, v + 0.07, 0.050, 0.17))
    canvas = over(canvas, 0.6 * i.skin + 0.4, 0.30 * blob(u + 0.012, v + 0.085, 0.032, 0.12))
    canvas = tint(canvas, _SHADOW, 0.85 * blob(u - 0.01, v - 0.030, 1.45 * i.nose_width, 0.045))
    wing = cover(ellipse(m - 0.62 * i.nose_width, v - 0.006, 0.42 * i.nose_width, 0.026), 4.0 * soft)
    tip = cover(ellipse(u, v, i.nose_size, 0.88 * i.nose_size), 4.0 * soft)
    ball = jnp.maximum(wing, tip)
    warm = i.skin * jnp.asarray([1.0, 0.925, 0.90])
    canvas = over(canvas, warm, 0.9 * ball)
    canvas = tint(canvas, _SHADOW, 0.8 * ball * smooth(v, -0.004, 0.045))
    canvas = tint(canvas, (0.55, 0.40, 0.38), 0.9 * cover(ellipse(m - 0.45 * i.nose_width, v - 0.028, 0.015, 0.0085),
                                                          2.5 * soft))  # fmt: skip
    return over(canvas, 0.4 * i.skin + 0.6, 0.6 * blob(u + 0.012, v + 0.012, 0.024, 0.019))


def draw_eyes(under: Colour, identity: Identity, state: FaceState, pose: Pose, soft: float) -> Colour:
    """Eyes with lids, lashes and brows."""
    i = identity
    m, side = jnp.abs(pose.u), jnp.sign(pose.u)
    happy, sad = jnp.maximum(state.smile, 0.0), jnp.maximum(-state.smile, 0.0)
    x, y = m - i.eye_spacing, pose.v - i.eye_y
    y = y + i.eye_tilt * x
    s = x * (1.0 / i.eye_width)
    ss = s * s
    arch = 1.0 - ss
    full = arch * (1.0 + 0.35 * ss)
    wide = 1.0 + 0.22 * jnp.maximum(state.brow_raise, 0.0) - 0.18 * state.brow_furrow - 0.10 * sad
    low = (0.72 - 0.30 * happy) * i.eye_height * full
    high = -i.eye_height * wide * (1.0 + 0.18 * jnp.minimum(state.gaze_y * -1.0, 0.3)) * full
    closed = jnp.clip(state.blink, 0.0, 1.0)
    lid = high + (low - high) * closed
    gap = jnp.maximum(lid - y, y - low)
    eye = cover(gap, soft) * (1.0 - smooth(closed, 0.86, 0.97))

    canvas = tint(under, _SHADOW, 0.45 * cover(jnp.maximum(high - 0.012 - y, y - low), 5.0 * soft)
                  * smooth(arch, -0.05, 0.25))  # fmt: skip
    white = over(canvas, jnp.asarray([0.97, 0.96, 0.95]), eye)
    gx = x - 0.036 * state.gaze_x * side + 0.004
    gy = y - 0.020 * state.gaze_y
    r = 0.80 * i.eye_height + 0.006
    dist = jnp.sqrt(gx * gx + gy * gy + 1e-6)
    iris = cover(dist - r, soft)
    inner = smooth(dist, 0.3 * r, 0.95 * r)
    lit = smooth(gy, -0.5 * r, 0.9 * r)
    glow = tuple(i.eye_color[c] * (1.0 - 0.45 * inner + 0.55 * lit) for c in range(3))
    white = over(white, glow, eye * iris)
    white = over(white, jnp.asarray([0.04, 0.03, 0.04]), eye * cover(dist - 0.48 * r, 1.5 * soft))
    white = tint(white, (0.62, 0.60, 0.66), 0.7 * eye * smooth(y - lid, 0.028, 0.0))
    glint = cover(ellipse(gx + side * 0.33 * r, gy + 0.36 * r, 0.27 * r, 0.27 * r), 1.5 * soft)
    white = over(white, jnp.asarray([1.0, 1.0, 1.0]), 0.95 * eye * glint)
    glint2 = blob(gx - side * 0.35 * r, gy - 0.40 * r, 0.30 * r, 0.30 * r)
    canvas = over(white, jnp.asarray([1.0, 1.0, 1.0]), 0.45 * eye * glint2)

    thick = 0.0085 + 0.007 * i.lashes * smooth(s, -0.8, 1.0)
    lash = jnp.abs(y - lid + 0.004) - thick * jnp.minimum(1.0, 3.0 * (arch + 0.12))
    ink = jnp.asarray([0.14, 0.09, 0.09])
    canvas = over(canvas, ink, 0.92 * cover(lash, soft) * smooth(arch, -0.14, 0.0))
    wing_s = (x - i.eye_width) * (1 / 0.030)
    wing = jnp.abs(y + 0.010 + 0.5 * (x - i.eye_width)) - 0.008 * (1.0 - wing_s)
    wing = jnp.maximum(wing, jnp.abs(x - i.eye_width - 0.012) - 0.020)
    canvas = over(canvas, ink, i.lashes * (1.0 - closed) * cover(wing, soft))
    canvas = tint(canvas, (0.70, 0.52, 0.50), 0.55 * cover(jnp.abs(y - low) - 0.003, 1.5 * soft) * smooth(arch, 0, 0.3))
    fold = jnp.abs(y - high + 0.026 - 0.10 * i.eye_height * closed) - 0.0035
    canvas = tint(canvas, (0.66, 0.50, 0.48), 0.6 * cover(fold, 1.5 * soft) * smooth(arch, 0.0, 0.35))
    return _draw_brows(canvas, i, state, m, pose.v, soft)


def _draw_brows(under: Colour, i: Identity, state: FaceState, m: Plane, v: Plane, soft: float) -> Colour:
    furrow, sad = state.brow_furrow, jnp.maximum(-state.smile, 0.0)
    x = m - i.eye_spacing - 0.008 + 0.016 * furrow
    s = x * (1.0 / i.brow_length)
    ss = s * s
    # Positive slope lifts the outer end: anger draws the inner ends down, sadness lifts them.
    tilt = i.brow_tilt + 0.45 * furrow - 0.38 * sad * (1.0 - furrow)
    height = i.brow_height + 0.045 * state.brow_raise - 0.030 * furrow
    arch = i.brow_arch + 0.010 * jnp.maximum(state.brow_raise, 0.0)
    y = v - i.eye_y + height + tilt * x + arch * (1.0 - ss)
    thick = i.brow_thickness * (1.0 - 0.30 * s) * jnp.minimum(1.0, 2.2 * (1.0 - ss))
    brow = cover(jnp.abs(y) - thick, 1.8 * soft) * smooth(ss, 1.05, 0.9)
    canvas = over(under, i.brow_color, 0.92 * brow)
    crease = cover(jnp.abs(m - 0.026) - 0.004, 2.0 * soft) * blob(m - 0.026, v - i.eye_y + 0.085, 0.05, 0.055)
    return tint(canvas, _SHADOW, 0.8 * furrow * crease)


def draw_glasses(under: Colour, identity: Identity, state: FaceState, pose: Pose, soft: float) -> Colour:
    """Frames a little in front of the face."""
    i = identity
    u, v = pose.u - 0.05 * jnp.sin(state.yaw), pose.v - i.eye_y - 0.05 * jnp.sin(state.pitch) - 0.006
    m = jnp.abs(u)
    x = m - i.eye_spacing - 0.006
    square = 0.85 * (1.0 - i.glasses_round)
    lens = squircle(x, v, i.glasses_size, i.glasses_size * (0.82 + 0.16 * i.glasses_round), square)
    rim = jnp.abs(lens) - 0.0085
    bridge = jnp.maximum(jnp.abs(v + 0.018 - 0.9 * u * u) - 0.008, m - i.eye_spacing + i.glasses_size - 0.004)
    arm = jnp.maximum(jnp.abs(v + 0.020) - 0.009, i.eye_spacing + i.glasses_size - m)
    arm = jnp.maximum(arm, jnp.abs(pose.x) - 1.01 * i.head_width)
    frame = jnp.minimum(jnp.minimum(rim, bridge), arm)
    canvas = over(under, jnp.asarray([0.92, 0.96, 1.0]), 0.10 * i.glasses * cover(lens, soft))
    streak = cover(jnp.abs(x + 0.6 * v + 0.035) - 0.018, 3.0 * soft) * cover(lens + 0.02, soft)
    canvas = over(canvas, jnp.asarray([1.0, 1.0, 1.0]), 0.13 * i.glasses * streak)
    return over(canvas, i.glasses_color, i.glasses * cover(frame, soft))
