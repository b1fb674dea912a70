"""A small network that reads a face from pixels: mouth, expression, gaze, pose, and who it is.

Two convolutional networks. One sees the whole picture at half its size and says where the mouth is, how the head
stands, what eyes and brows do, and the parameters of the face. The other sees the 64x64 pixels around that mouth at
full size, because a pair of lips that closes moves by two pixels. Both are trained on rendered faces
(`pikastream_jax/training/face_estimator.py`), whose truth is exact; their errors on held-out faces are part of every
evaluation.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from pikastream_jax.data.face import FaceState, Identity, mouth_box, true_mouth
from pikastream_jax.nn.layers import Params, functional
from pikastream_jax.weights.safetensors_io import load, restore_into

SIZE = 256  # pixels each way of the pictures that are read
MOUTH_CROP = 64  # pixels each way around the mouth
WEIGHTS = Path(__file__).resolve().parent.parent / "assets" / "estimator.safetensors"

# What the networks put out, each with the mean and the scale that turn it into a number of about unit variance.
MOUTH_OUTPUTS = {"opening": (0.35, 0.35), "width": (0.26, 0.05), "smile": (0.0, 0.6)}
HEAD_OUTPUTS = {
    "mouth_y": (163.0, 12.0),  # pixels, the middle of the mouth's box
    "mouth_x": (128.0, 14.0),
    "yaw": (0.0, 0.20),  # radians
    "pitch": (0.0, 0.13),
    "roll": (0.0, 0.10),
    "gaze_x": (0.0, 0.6),
    "gaze_y": (0.0, 0.6),
    "blink": (0.15, 0.3),
    "brow_raise": (0.0, 0.6),
    "brow_furrow": (0.25, 0.3),
}
# The parameters of the face itself (what `hard_distractor` exchanges), with the mean and half range of `sample_identity`.
IDENTITY_OUTPUTS = {
    "head_width": (0.407, 0.030),
    "head_height": (0.535, 0.020),
    "jaw": (0.76, 0.12),
    "squareness": (0.27, 0.17),
    "ear_size": (0.095, 0.015),
    "skin": (0.66, 0.22),
    "freshness": (0.6, 0.22),
    "eye_color": (0.32, 0.17),
    "eye_spacing": (0.1775, 0.0125),
    "eye_y": (0.02, 0.025),
    "eye_width": (0.095, 0.009),
    "eye_height": (0.062, 0.009),
    "eye_tilt": (0.05, 0.11),
    "brow_height": (0.1275, 0.014),
    "brow_length": (0.0975, 0.0125),
    "brow_thickness": (0.0155, 0.004),
    "brow_arch": (0.026, 0.017),
    "brow_tilt": (0.03, 0.13),
    "nose_y": (0.1875, 0.0225),
    "nose_width": (0.064, 0.010),
    "nose_size": (0.044, 0.008),
    "mouth_y": (0.33, 0.015),
    "mouth_size": (0.149, 0.017),
    "lip_upper": (0.026, 0.006),
    "lip_lower": (0.036, 0.007),
    "lip_color": (0.5, 0.18),
}
_COLOURS = ("skin", "eye_color", "lip_color")
IDENTITY_SIZE = sum(3 if name in _COLOURS else 1 for name in IDENTITY_OUTPUTS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
    """What was read from n pictures. Units are those of `FaceState`, except where said."""

    opening: Float[Array, " n"]  # of the lips, 0 closed .. 1: the renderer's widest
    width: Float[Array, " n"]  # of the mouth, as a fraction of the height of the face
    smile: Float[Array, " n"]
    yaw: Float[Array, " n"]
    pitch: Float[Array, " n"]
    roll: Float[Array, " n"]
    gaze_x: Float[Array, " n"]
    gaze_y: Float[Array, " n"]
    blink: Float[Array, " n"]
    brow_raise: Float[Array, " n"]
    brow_furrow: Float[Array, " n"]
    identity: Float[Array, "n 32"]  # the face's parameters, each of about unit variance over people


class _Stage(nnx.Module):
    """Halves the picture each way: normalise, 3x3 convolution, GELU."""

    def __init__(self, channels_in: int, channels_out: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(channels_in, rngs=rngs)
        self.conv = nnx.Conv(channels_in, channels_out, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n i j d"]:
        return jax.nn.gelu(self.conv(self.norm(x)))


class PixelReader(nnx.Module):
    """Picture -> numbers: 4x4 patches, convolutions that halve the grid down to 8x8, and an MLP over all of it.

    The last grid is flattened, not averaged: where things are is what is asked for.
    """

    def __init__(self, size: int, widths: tuple[int, ...], hidden: int, outputs: int, *, rngs: nnx.Rngs):
        self.patch = nnx.Conv(3, widths[0], (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.stages = nnx.List(
            [_Stage(a, b, rngs=rngs) for a, b in zip(widths[:-1], widths[1:], strict=True)],
        )
        grid = size // 4 >> (len(widths) - 1)
        self.squeeze = nnx.Linear(widths[-1], 20, rngs=rngs)
        self.up = nnx.Linear(grid * grid * 20, hidden, rngs=rngs)
        self.head = nnx.Linear(hidden, outputs, rngs=rngs)

    def __call__(self, pictures: Float[Array, "n h w 3"]) -> Float[Array, "n o"]:
        x = jax.nn.gelu(self.patch(pictures))
        for stage in self.stages:
            x = stage(x)
        x = self.squeeze(x)
        return self.head(jax.nn.gelu(self.up(x.reshape(len(x), -1))))


class FaceEstimator(nnx.Module):
    """Both networks. Pictures are float32 in [-1, 1]; outputs are normalised, see `split_outputs`."""

    def __init__(self, *, rngs: nnx.Rngs):
        outputs = len(HEAD_OUTPUTS) + IDENTITY_SIZE
        self.whole = PixelReader(SIZE // 2, (48, 80, 96), 128, outputs, rngs=rngs)
        self.mouth = PixelReader(MOUTH_CROP, (32, 64), 64, len(MOUTH_OUTPUTS), rngs=rngs)


def halve(pictures: Float[Array, "n h w 3"]) -> Float[Array, "n i j 3"]:
    """Half the size each way by the mean of 2x2 pixels."""
    n, h, w, c = pictures.shape
    return pictures.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def mouth_origin(centre_y: Float[Array, " n"], centre_x: Float[Array, " n"]) -> Int[Array, "n 2"]:
    """First pixel of the crop around a mouth, kept inside the picture."""
    corner = jnp.round(jnp.stack([centre_y, centre_x], axis=-1) - MOUTH_CROP / 2)
    return jnp.clip(corner, 0, SIZE - MOUTH_CROP).astype(jnp.int32)


def mouth_centre(identity: Identity, state: FaceState) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(y, x) of the middle of the mouth's box in pixels of a picture of 256x256."""
    y0, x0, y1, x1 = mouth_box(identity, state, SIZE)
    return (y0 + y1) / 2, (x0 + x1) / 2


def true_outputs(identity: Identity, state: FaceState) -> tuple[Float[Array, " h"], Float[Array, " m"]]:
    """What both networks should put out, normalised, for one face in one state."""
    y, x = mouth_centre(identity, state)
    _, width = true_mouth(identity, state)
    head = {"mouth_y": y, "mouth_x": x} | {name: getattr(state, name) for name in list(HEAD_OUTPUTS)[2:]}
    mouth = {"opening": jnp.clip(state.mouth_open, 0.0, 1.0), "width": width, "smile": state.smile}
    head_row = [_normalise(head[name], *HEAD_OUTPUTS[name]) for name in HEAD_OUTPUTS]
    mouth_row = [_normalise(mouth[name], *MOUTH_OUTPUTS[name]) for name in MOUTH_OUTPUTS]
    return jnp.concatenate([jnp.stack(head_row), identity_vector(identity)]), jnp.stack(mouth_row)


def identity_vector(identity: Identity) -> Float[Array, "32"]:
    """The face's parameters, normalised: the truth of `Reading.identity`."""
    parts = [_normalise(getattr(identity, name), mean, scale) for name, (mean, scale) in IDENTITY_OUTPUTS.items()]
    return jnp.concatenate([jnp.atleast_1d(part) for part in parts])


def apply(estimator: FaceEstimator, pictures: Float[Array, "n 256 256 3"]) -> Reading:
    """Reads pictures in [-1, 1]: the whole first, then the mouth where the first network says it is."""
    head = estimator.whole(halve(pictures))
    named = {name: head[:, i] * scale + mean for i, (name, (mean, scale)) in enumerate(HEAD_OUTPUTS.items())}
    origin = mouth_origin(named.pop("mouth_y"), named.pop("mouth_x"))
    crop = jax.vmap(lambda p, o: jax.lax.dynamic_slice(p, (o[0], o[1], 0), (MOUTH_CROP, MOUTH_CROP, 3)))
    mouth = estimator.mouth(crop(pictures, origin))
    named |= {name: mouth[:, i] * scale + mean for i, (name, (mean, scale)) in enumerate(MOUTH_OUTPUTS.items())}
    return Reading(identity=head[:, len(HEAD_OUTPUTS) :], **named)


class Estimator:
    """The trained estimator, for whole clips.

    Raises:
      FileNotFoundError, ValueError: no weights at `weights`, or weights of another network.
    """

    BATCH = 24  # pictures at a time; every call is padded to it, so that one program is compiled

    def __init__(self, weights: str | Path = WEIGHTS):
        model = functional(lambda rngs: FaceEstimator(rngs=rngs))
        stored, self.metadata = load(weights)
        # Kept in bfloat16 on disk, used in float32.
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), model.abstract)
        self.params: Params = restore_into(wanted, stored)
        self._read = jax.jit(lambda params, video: apply(model.bind(params), video.astype(jnp.float32) / 127.5 - 1.0))

    def __call__(self, frames: UInt8[np.ndarray, "n 256 256 3"]) -> Reading:
        """Reads every picture.

        Raises:
          ValueError: the pictures are not uint8 of 256x256.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != (SIZE, SIZE, 3) or not len(frames):
            raise ValueError(
                f"the estimator reads uint8 pictures [n, {SIZE}, {SIZE}, 3] with n >= 1, got {frames.dtype} "
                f"{list(frames.shape)}: resize them"
            )
        parts = []
        for start in range(0, len(frames), self.BATCH):
            part = frames[start : start + self.BATCH]
            padded = np.concatenate([part, np.repeat(part[-1:], self.BATCH - len(part), axis=0)])
            reading = jax.device_get(self._read(self.params, padded))
            parts.append(jax.tree.map(functools.partial(_first, count=len(part)), reading))
        return join(parts)


def join(parts: Iterable[Reading]) -> Reading:
    """Readings one after another, as one."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _first(leaf: np.ndarray, count: int) -> np.ndarray:
    return np.asarray(leaf)[:count]


def _normalise(value: Array, mean: float, scale: float) -> Array:
    return (value - mean) / scale
