"""Batches of procedural faces for FlashVAE: more varied in motion than any speech, so that every shape is learned."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pikastream_jax.data.face import FaceState, eyes_box, mouth_box, render, sample_identity

# Ranges from which the states of training clips are drawn: (low, high) per field of FaceState.
STATE_RANGES = {
    "yaw": (-0.35, 0.35),
    "pitch": (-0.22, 0.22),
    "roll": (-0.18, 0.18),
    "shift_x": (-0.03, 0.03),
    "shift_y": (-0.03, 0.03),
    "gaze_x": (-1.0, 1.0),
    "gaze_y": (-1.0, 1.0),
    "blink": (0.0, 1.0),
    "brow_raise": (-1.0, 1.0),
    "brow_furrow": (0.0, 1.0),
    "smile": (-1.0, 1.0),
    "mouth_open": (0.0, 1.0),
    "mouth_width": (-1.0, 1.0),
    "tongue": (0.0, 1.0),
    "breath": (-1.0, 1.0),
}
# Fields that are often at rest, and where.
_RESTING = {"blink": 0.7, "mouth_open": 0.3, "brow_furrow": 0.5, "tongue": 0.5}
# Share of a field's range that it may cross in one video frame: lips and lids are fast, the head is slow.
_SPEED = {"mouth_open": 0.35, "mouth_width": 0.25, "blink": 0.4, "gaze_x": 0.2, "gaze_y": 0.2, "tongue": 0.25}
_MISS = 0.06  # of the picture's side: how far apart crops on the middle of one face may lie


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FaceBatch:
    """Rendered crops and where the interesting parts lie."""

    video: Float[Array, "b t h w 3"]  # in [-1, 1]
    boxes: Float[Array, "b t 2 4"]  # mouth and eyes, pixels of the whole picture
    origin: Float[Array, "b 2"]  # (y, x) of the crop


def random_states(key: Array, frames: int) -> FaceState:
    """A short random motion: every field starts anywhere in its range and drifts, lips and lids fast, the head slowly."""
    low, high = jnp.asarray([*STATE_RANGES.values()]).T
    resting = jnp.asarray([_RESTING.get(name, 0.0) for name in STATE_RANGES])
    speeds = jnp.asarray([_SPEED.get(name, 0.04) for name in STATE_RANGES])

    def share(index, resting, speed):
        """Of a field's range, in every frame."""
        k_start, k_rest, k_move = jax.random.split(jax.random.fold_in(key, index), 3)
        start = jax.random.uniform(k_start)
        start = jnp.where(jax.random.uniform(k_rest) < resting, 0.0, start)
        steps = jax.random.uniform(k_move, (frames,), minval=-speed, maxval=speed).at[0].set(0.0)
        return jnp.clip(start + jnp.cumsum(steps), 0.0, 1.0)

    # All fields at once: written out field by field, the random numbers alone were half of what the compiler has to do for a batch.
    shares = jax.vmap(share)(jnp.arange(len(STATE_RANGES)), resting, speeds)
    return FaceState(**dict(zip(STATE_RANGES, low[:, None] + (high - low)[:, None] * shares, strict=True)))


def face_batch(key: Array, batch: int, frames: int, size: int, crop: int, faces: float = 0.0) -> FaceBatch:
    """Random people in random motion.

    Args:
      crop: pixels each way; below `size` the crop lies on the mouth (half of the time), on the eyes, or anywhere.
      faces: share of the crops that lie, before any of these, between mouth and eyes, to hold both.
    """

    def one(key):
        k_identity, k_state, k_crop, k_where = jax.random.split(key, 4)
        k_face = jax.random.fold_in(key, 4)
        identity = sample_identity(k_identity)
        states = random_states(k_state, frames)
        mouth = jax.vmap(lambda s: mouth_box(identity, s, size))(states)
        eyes = jax.vmap(lambda s: eyes_box(identity, s, size))(states)
        where = jax.random.uniform(k_where)
        jitter = jax.random.uniform(k_crop, (2,))
        target = jnp.where(where < 0.5, mouth[0], eyes[0])
        centre = jnp.stack([target[0] + target[2], target[1] + target[3]]) / 2
        aimed = centre - crop / 2 + (jitter - 0.5) * crop * 0.6
        anywhere = jitter * (size - crop)
        corner = jnp.where(where < 0.75, aimed, anywhere)
        middle = (mouth[0, :2] + mouth[0, 2:] + eyes[0, :2] + eyes[0, 2:]) / 4
        both = middle - crop / 2 + (jitter - 0.5) * _MISS * size
        corner = jnp.where(jax.random.uniform(k_face) < faces, both, corner)
        origin = jnp.clip(jnp.round(corner), 0, size - crop)
        start = (origin[0].astype(jnp.int32), origin[1].astype(jnp.int32))
        video = jax.vmap(lambda s: render(identity, s, size=size, origin=start, crop=(crop, crop)))(states)
        return FaceBatch(video, jnp.stack([mouth, eyes], axis=1), origin)

    return jax.vmap(one)(jax.random.split(key, batch))
