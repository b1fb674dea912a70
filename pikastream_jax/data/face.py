"""A procedural talking head: one cartoon person, drawn from an identity and a state, in plain JAX.

It gives the project unlimited talking faces whose truth (identity, pose, mouth opening) is known exactly. Everything is
a pure function; `jax.vmap` over frames or people and `jax.jit` as needed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from pikastream_jax.data import face_features as features
from pikastream_jax.data import face_layers as layers
from pikastream_jax.data.face_identity import (
    Identity,
    hard_distractor,
    presentation_name,
    sample_identity,
)
from pikastream_jax.data.face_pose import FaceState, neutral_state, to_face, to_picture
from pikastream_jax.data.face_shapes import Colour

__all__ = [
    "FaceState", "Identity", "eyes_box", "hard_distractor", "map_renders", "mouth_box", "neutral_state",
    "presentation_name", "render", "sample_identity", "true_mouth",
]  # fmt: skip

_EDGE_PIXELS = 1.5  # width of an anti-aliased edge
_AT_ONCE = 64  # pictures that an accelerator draws together


def render(
    identity: Identity,
    state: FaceState,
    *,
    size: int = 256,
    origin: tuple[Int[Array, ""] | int, Int[Array, ""] | int] = (0, 0),
    crop: tuple[int, int] | None = None,
) -> Float[Array, "h w 3"]:
    """Draw one frame.

    Args:
      identity: who.
      state: what the face does in this frame (scalar leaves).
      size: side of the whole square picture in pixels; the picture is the same at any size.
      origin: (y0, x0), the crop's first pixel in the whole picture; may be traced.
      crop: (height, width) of the part that is drawn, at most (size, size); only its pixels are computed. The whole
        picture when None.

    Returns:
      float32 ``[height, width, 3]`` in [-1, 1], sRGB, on the 256 levels of an 8-bit picture (so without gradients).
    """
    height, width = (size, size) if crop is None else crop
    if not (0 < height <= size and 0 < width <= size):
        raise ValueError(f"crop={crop} does not fit a picture of size={size}: use 1 to {size} in both directions")
    identity, state = _settle((identity, state))
    soft = _EDGE_PIXELS * 2.0 / size
    px, py = _grid(origin[0], origin[1], height, width, size)
    pose = to_face(identity, state, px, py)
    lines = layers.outline(identity, state, pose)
    canvas = layers.draw_background(identity, px, py)
    canvas = layers.draw_back_hair(canvas, identity, pose, lines, soft)
    canvas = layers.draw_body(canvas, identity, state, px, py, pose, lines, soft)
    canvas = layers.draw_head(canvas, identity, state, pose, lines, soft)
    canvas = layers.draw_beard(canvas, identity, pose, lines, soft)
    canvas = features.draw_nose(canvas, identity, state, pose, soft)
    canvas = features.draw_mouth(canvas, identity, state, pose, soft)
    canvas = features.draw_eyes(canvas, identity, state, pose, soft)
    canvas = features.draw_glasses(canvas, identity, state, pose, soft)
    canvas = layers.draw_front_hair(canvas, identity, state, pose, lines, soft)
    return _to_channels(canvas, state)


def mouth_box(identity: Identity, state: FaceState, size: int = 256) -> Float[Array, "4"]:
    """Box (y0, x0, y1, x1), in pixels of a picture of ``size``, around every pixel that the mouth can change."""
    half = 1.35 * identity.mouth_size + 0.03
    opening = 2.0 * identity.head_height * features.MAX_OPENING
    return _box(identity, state, size, (-half, half), (identity.mouth_y - 0.125, identity.mouth_y + opening + 0.10))


def eyes_box(identity: Identity, state: FaceState, size: int = 256) -> Float[Array, "4"]:
    """Box (y0, x0, y1, x1), in pixels of a picture of ``size``, around the eyes and their lids."""
    half = identity.eye_spacing + 1.35 * identity.eye_width + 0.02
    return _box(identity, state, size, (-half, half), (identity.eye_y - 0.115, identity.eye_y + 0.085))


def true_mouth(identity: Identity, state: FaceState) -> tuple[Float[Array, "*t"], Float[Array, "*t"]]:
    """Opening between the lips' inner edges and width of the mouth, as fractions of the height of the face."""
    shape = features.mouth_shape(identity, state)
    face = 2.0 * identity.head_height
    return shape.opening / face, 2.0 * shape.half_width / face


def _settle(tree):
    """The same values, computed before the loop over pixels.

    XLA on CPU drops `lax.optimization_barrier` before it fuses, and then reads (inside a loop over frames: slices) every
    parameter again for every pixel. It never fuses an integer division by a traced number into a loop that reuses the
    quotient, so dividing the bits by one is a barrier it keeps: 10 times faster inside `lax.map` and `lax.scan`.
    """
    flat, unravel = ravel_pytree(tree)
    one = jnp.uint32(1) + (0.0 * flat[0]).astype(jnp.uint32)
    return unravel(lax.bitcast_convert_type(lax.div(lax.bitcast_convert_type(flat, jnp.uint32), one), jnp.float32))


def map_renders(function: Callable[[PyTree], PyTree], xs: PyTree) -> PyTree:
    """`jax.lax.map` for functions that render: in batches on an accelerator, one after another on a CPU, where that is several times faster."""
    return lax.map(function, xs, batch_size=None if jax.default_backend() == "cpu" else _AT_ONCE)


def _to_channels(canvas: Colour, state: FaceState) -> Float[Array, "h w 3"]:
    """Three planes in [0, 1] to one picture in [-1, 1] with the 256 levels of an 8-bit picture.

    The planes pass through one integer plane, with the same barrier as in `_settle`. Otherwise XLA on CPU computes
    everything once per channel, which takes three times as long.
    """
    red, green, blue = ((jnp.clip(plane, 0.0, 1.0) * 255.0 + 0.5).astype(jnp.uint32) for plane in canvas)
    packed = (red << 16) | (green << 8) | blue
    limit = jnp.uint32(1 << 24) + (0.0 * state.yaw).astype(jnp.uint32)
    packed = lax.rem(packed, limit)
    levels = (packed[..., None] >> jnp.asarray([16, 8, 0], jnp.uint32)) & 255
    return levels.astype(jnp.float32) / 127.5 - 1.0


def _grid(y0, x0, height: int, width: int, size: int) -> tuple[Array, Array]:
    """Picture coordinates of pixel centres, ``[height, width]`` each."""
    y = (jnp.arange(height) + y0 + 0.5) * (2.0 / size) - 1.0
    x = (jnp.arange(width) + x0 + 0.5) * (2.0 / size) - 1.0
    return jnp.broadcast_to(x[None, :], (height, width)), jnp.broadcast_to(y[:, None], (height, width))


def _box(identity: Identity, state: FaceState, size: int, us, vs) -> Float[Array, "4"]:
    """The picture's bounding box of a rectangle on the frontal face: of its corners and the middles of its sides."""
    u = jnp.stack([us[0], us[1], us[0], us[1], jnp.zeros_like(us[0]), jnp.zeros_like(us[0]), us[0], us[1]])
    middle = 0.5 * (vs[0] + vs[1])
    v = jnp.stack([vs[0], vs[0], vs[1], vs[1], vs[0], vs[1], middle, middle])
    x, y = to_picture(identity, state, u, v)
    corners = jnp.stack([y.min(), x.min(), y.max(), x.max()])
    return jnp.clip((corners + 1.0) * (0.5 * size), 0.0, float(size))
