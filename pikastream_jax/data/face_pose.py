"""How the head stands: the state of one frame, and the mapping between the picture and the frontal face.

The head is an ellipsoid. Each picture point is taken back to the frontal face by rolling it upright, lifting it onto
the ellipsoid and turning it back by yaw and pitch; features are then drawn flat on the frontal face. So features get
their foreshortening and parallax from one square root a pixel.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pikastream_jax.data.face_identity import Identity

HEAD_CENTRE_Y = -0.07  # picture units
PIVOT_Y = 0.50  # the base of the skull, around which the head rolls
_REACH = 0.12  # how far the centre of the head swings when it turns by one radian
_LIFT = 1.18  # the ellipsoid is this much wider than the outline, so that the mapping stays smooth at the outline
_DEPTH = 1.05  # depth of the head over its half width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FaceState:
    """What the face does in one frame, or in T frames with a leading axis on every leaf. All float32."""

    yaw: Float[Array, "*t"]  # radians, |yaw| <= 0.35, positive towards the right edge of the picture
    pitch: Float[Array, "*t"]  # radians, |pitch| <= 0.25, positive looks down
    roll: Float[Array, "*t"]  # radians, |roll| <= 0.2, positive tilts towards the right edge
    shift_x: Float[Array, "*t"]  # fraction of the picture's width
    shift_y: Float[Array, "*t"]
    gaze_x: Float[Array, "*t"]  # -1 left edge of the picture .. 1 right
    gaze_y: Float[Array, "*t"]  # -1 up .. 1 down
    blink: Float[Array, "*t"]  # 0 open .. 1 closed
    brow_raise: Float[Array, "*t"]  # -1 .. 1
    brow_furrow: Float[Array, "*t"]  # 0 .. 1
    smile: Float[Array, "*t"]  # -1 sad .. 1 broad smile
    mouth_open: Float[Array, "*t"]  # 0 lips closed .. 1
    mouth_width: Float[Array, "*t"]  # -1 pursed .. 0 .. 1 spread
    tongue: Float[Array, "*t"]  # 0 hidden .. 1 raised behind the teeth
    breath: Float[Array, "*t"]  # -1 .. 1, shoulders up for positive values


def neutral_state(frames: int | None = None) -> FaceState:
    """The face at rest, looking into the camera; with ``frames``, that many frames of it."""
    zero = jnp.zeros(() if frames is None else (frames,), jnp.float32)
    return FaceState(**{f.name: zero for f in fields(FaceState)})


class Pose(NamedTuple):
    """Picture points seen from the head."""

    x: Array  # head coordinates in the picture plane (rolled back, origin at the middle of the head)
    y: Array
    u: Array  # frontal face coordinates
    v: Array
    z: Array  # height on the unit ellipsoid, 1 in the middle, 0 from its rim outwards


def head_centre(state: FaceState) -> tuple[Array, Array]:
    """Middle of the head in the picture, before the roll."""
    return (
        2.0 * state.shift_x + _REACH * jnp.sin(state.yaw),
        HEAD_CENTRE_Y + 2.0 * state.shift_y + _REACH * jnp.sin(state.pitch),
    )


def to_face(identity: Identity, state: FaceState, px: Array, py: Array) -> Pose:
    """Head and frontal face coordinates of the picture points ``px``, ``py`` (any shape)."""
    cx, cy = head_centre(state)
    pivot_x = 2.0 * state.shift_x
    cos, sin = jnp.cos(state.roll), jnp.sin(state.roll)
    dx, dy = px - pivot_x, py - PIVOT_Y
    x = cos * dx + sin * dy + pivot_x - cx
    y = -sin * dx + cos * dy + PIVOT_Y - cy
    u, v, z = _turn_back(identity, state, x, y)
    return Pose(x, y, u, v, z)


def to_picture(identity: Identity, state: FaceState, u: Array, v: Array) -> tuple[Array, Array]:
    """Picture coordinates of frontal face points: the inverse of `to_face`, by fixed-point iteration."""
    sy, cy_, sp, cp = jnp.sin(state.yaw), jnp.cos(state.yaw), jnp.sin(state.pitch), jnp.cos(state.pitch)
    x, y = u, v
    for _ in range(8):
        z = _depth(identity) * _ellipsoid(identity, x, y)
        x, y = (u + z * sy) / cy_, (v + (z * cy_ + x * sy) * sp) / cp
    cx, cy = head_centre(state)
    pivot_x = 2.0 * state.shift_x
    cos, sin = jnp.cos(state.roll), jnp.sin(state.roll)
    dx, dy = x + cx - pivot_x, y + cy - PIVOT_Y
    return cos * dx - sin * dy + pivot_x, sin * dx + cos * dy + PIVOT_Y


def _turn_back(identity: Identity, state: FaceState, x: Array, y: Array) -> tuple[Array, Array, Array]:
    sy, cy, sp, cp = jnp.sin(state.yaw), jnp.cos(state.yaw), jnp.sin(state.pitch), jnp.cos(state.pitch)
    z = _ellipsoid(identity, x, y)
    depth = _depth(identity) * z
    return x * cy - depth * sy, y * cp - (depth * cy + x * sy) * sp, z


def _ellipsoid(identity: Identity, x: Array, y: Array) -> Array:
    p, q = x * (1.0 / (_LIFT * identity.head_width)), y * (1.0 / (_LIFT * identity.head_height))
    return jnp.sqrt(jnp.maximum(1.0 - p * p - q * q, 1e-6))


def _depth(identity: Identity) -> Array:
    return _DEPTH * identity.head_width
