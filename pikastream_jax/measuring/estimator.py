"""A small network that reads a face from pixels: mouth, expression, gaze, pose, and who it is.

Three convolutional readers. The first sees the whole picture at half its size and says where mouth and eyes are, how the
head stands and what shape it has. The others see the pixels around that mouth and those eyes at full size, because a
pair of lips that closes moves by two pixels. All are trained on rendered faces
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

from pikastream_jax.data.face import FaceState, Identity, eyes_box, mouth_box, true_mouth
from pikastream_jax.nn.layers import Params, functional
from pikastream_jax.weights.safetensors_io import load, restore_into

SIZE = 256  # pixels each way of the pictures that are read; others are brought to it
SMALLEST = 64
WEIGHTS = Path(__file__).resolve().parent.parent / "assets" / "estimator.safetensors"


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """One reader: what it sees and what it says.

    Numbers are given with the mean and the scale that bring them to about unit variance. The face's parameters are
    those that `hard_distractor` exchanges.
    """

    height: int  # of the pixels it sees
    width: int
    channels: tuple[int, ...]  # of the grids, each half as fine as the one before
    hidden: int
    quantities: dict[str, tuple[float, float]]
    identity: dict[str, tuple[float, float]]  # a colour is three numbers

    @property
    def features(self) -> int:
        """Numbers that describe the face itself."""
        return sum(3 if name in _COLOURS else 1 for name in self.identity)

    @property
    def outputs(self) -> int:
        return len(self.quantities) + self.features


_COLOURS = ("skin", "eye_color", "lip_color")
READERS = {
    "whole": ReaderConfig(
        height=SIZE // 2,
        width=SIZE // 2,
        channels=(32, 64, 96),
        hidden=128,
        quantities={
            "mouth_y": (170.0, 9.0),  # pixels, the middle of the mouth's box
            "mouth_x": (128.0, 14.0),
            "eyes_y": (120.0, 9.0),  # and of that of the eyes
            "eyes_x": (128.0, 14.0),
            "yaw": (0.0, 0.20),  # radians
            "pitch": (0.0, 0.13),
            "roll": (0.0, 0.10),
        },
        identity={
            "head_width": (0.411, 0.018),
            "head_height": (0.535, 0.0115),
            "jaw": (0.76, 0.083),
            "squareness": (0.27, 0.115),
            "ear_size": (0.095, 0.0087),
            "skin": (0.64, 0.21),
            "freshness": (0.6, 0.18),
            "eye_spacing": (0.1775, 0.0072),
            "eye_y": (0.02, 0.0144),
            "nose_y": (0.1875, 0.013),
            "nose_width": (0.064, 0.007),
            "nose_size": (0.044, 0.0046),
            "mouth_y": (0.33, 0.0087),
        },
    ),
    "eyes": ReaderConfig(
        height=48,
        width=96,
        channels=(32, 64),
        hidden=64,
        quantities={
            "gaze_x": (0.0, 0.6),
            "gaze_y": (0.0, 0.6),
            "blink": (0.15, 0.3),
            "brow_raise": (0.0, 0.6),
            "brow_furrow": (0.25, 0.3),
        },
        identity={
            "eye_color": (0.31, 0.13),
            "eye_width": (0.095, 0.0052),
            "eye_height": (0.062, 0.006),
            "eye_tilt": (0.05, 0.064),
            "brow_height": (0.1275, 0.0088),
            "brow_length": (0.0975, 0.0072),
            "brow_thickness": (0.0155, 0.0033),
            "brow_arch": (0.026, 0.013),
            "brow_tilt": (0.03, 0.075),
        },
    ),
    "mouth": ReaderConfig(
        height=64,
        width=64,
        channels=(32, 64),
        hidden=64,
        quantities={"opening": (0.35, 0.35), "width": (0.275, 0.05), "smile": (0.0, 0.6)},
        identity={
            "mouth_size": (0.149, 0.0098),
            "lip_upper": (0.026, 0.004),
            "lip_lower": (0.036, 0.005),
            "lip_color": (0.5, 0.17),
        },
    ),
}
# What every column of `true_readings` is.
COLUMNS = np.array([kind for reader in READERS.values() for kind in (*reader.quantities, *["identity"] * reader.features)])
IDENTITY_SIZE = sum(reader.features for reader in READERS.values())
_EYES_LIFT = 5.0  # pixels by which the eyes' crop lies higher than their box, to hold raised brows


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
    """Pixels -> numbers: 4x4 patches, convolutions that halve the grid, and an MLP over all of it.

    The last grid is flattened, not averaged: where things are is what is asked for.
    """

    def __init__(self, config: ReaderConfig, *, rngs: nnx.Rngs):
        channels = config.channels
        self.patch = nnx.Conv(3, channels[0], (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.stages = nnx.List([_Stage(a, b, rngs=rngs) for a, b in zip(channels[:-1], channels[1:], strict=True)])
        stride = 4 << (len(channels) - 1)
        self.squeeze = nnx.Linear(channels[-1], _SQUEEZED, rngs=rngs)
        self.up = nnx.Linear(config.height * config.width // stride**2 * _SQUEEZED, config.hidden, rngs=rngs)
        self.head = nnx.Linear(config.hidden, config.outputs, rngs=rngs)

    def __call__(self, pictures: Float[Array, "n h w 3"]) -> Float[Array, "n o"]:
        x = jax.nn.gelu(self.patch(pictures))
        for stage in self.stages:
            x = stage(x)
        x = self.squeeze(x)
        return self.head(jax.nn.gelu(self.up(x.reshape(len(x), -1))))


_SQUEEZED = 20  # channels of the flattened grid


class FaceEstimator(nnx.Module):
    """All readers. Pictures are float32 in [-1, 1]; outputs are normalised, quantities first, then identity."""

    def __init__(self, *, rngs: nnx.Rngs):
        for name, config in READERS.items():
            setattr(self, name, PixelReader(config, rngs=rngs))


def halve(pictures: Float[Array, "n h w 3"]) -> Float[Array, "n i j 3"]:
    """Half the size each way by the mean of 2x2 pixels."""
    n, h, w, c = pictures.shape
    return pictures.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def resized(pictures: Float[Array, "n s s 3"]) -> Float[Array, "n 256 256 3"]:
    """Pictures of any size at the one that is read: Lanczos, antialiased where they shrink.

    Of 128x128 it leaves the lips on the right side of the closure threshold more often than cubic (97.3% against 95.8%) or linear (93.9%) resizing.
    """
    if pictures.shape[1] == SIZE:
        return pictures
    return jnp.clip(jax.image.resize(pictures, (len(pictures), SIZE, SIZE, 3), "lanczos3"), -1.0, 1.0)


def crop_origin(reader: str, y: Float[Array, "*b"], x: Float[Array, "*b"]) -> Int[Array, "*b 2"]:
    """First pixel of what the reader of mouth or eyes sees, around the middle of their box; kept inside the picture."""
    config = READERS[reader]
    lift = _EYES_LIFT if reader == "eyes" else 0.0
    corner = jnp.round(jnp.stack([y - lift - config.height / 2, x - config.width / 2], axis=-1))
    return jnp.clip(corner, 0, jnp.asarray([SIZE - config.height, SIZE - config.width])).astype(jnp.int32)


def true_places(identity: Identity, state: FaceState) -> dict[str, Float[Array, ""]]:
    """Where mouth and eyes are: the middles of their boxes in pixels of a picture of 256x256."""
    places = {}
    for name, box in (("mouth", mouth_box(identity, state, SIZE)), ("eyes", eyes_box(identity, state, SIZE))):
        places |= {f"{name}_y": (box[0] + box[2]) / 2, f"{name}_x": (box[1] + box[3]) / 2}
    return places


def true_outputs(identity: Identity, state: FaceState) -> dict[str, Float[Array, " o"]]:
    """What each reader should put out for one face in one state."""
    seen = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    seen |= true_places(identity, state)
    seen |= {"opening": jnp.clip(state.mouth_open, 0.0, 1.0), "width": true_mouth(identity, state)[1]}
    result = {}
    for name, config in READERS.items():
        numbers = [(seen[q] - mean) / scale for q, (mean, scale) in config.quantities.items()]
        result[name] = jnp.concatenate([jnp.stack(numbers), _identity(identity, config)])
    return result


def true_readings(identity: Identity, state: FaceState) -> Float[Array, " o"]:
    """The same as one vector, reader after reader in the order of `READERS`."""
    return jnp.concatenate(list(true_outputs(identity, state).values()))


def apply(estimator: FaceEstimator, pictures: Float[Array, "n 256 256 3"]) -> Reading:
    """Reads pictures in [-1, 1]: the whole first, then mouth and eyes where the first reader says they are."""
    seen, identity = _named("whole", estimator.whole(halve(pictures)))
    parts = [identity]
    for name in ("eyes", "mouth"):
        shape = (READERS[name].height, READERS[name].width, 3)
        origin = crop_origin(name, seen.pop(f"{name}_y"), seen.pop(f"{name}_x"))
        crop = jax.vmap(lambda p, o, shape=shape: jax.lax.dynamic_slice(p, (o[0], o[1], 0), shape))
        read, identity = _named(name, getattr(estimator, name)(crop(pictures, origin)))
        seen |= read
        parts.append(identity)
    return Reading(identity=jnp.concatenate(parts, axis=-1), **seen)


def _named(reader: str, outputs: Float[Array, "n o"]) -> tuple[dict[str, Float[Array, " n"]], Float[Array, "n i"]]:
    quantities = READERS[reader].quantities
    named = {name: outputs[:, i] * scale + mean for i, (name, (mean, scale)) in enumerate(quantities.items())}
    return named, outputs[:, len(quantities) :]


def _identity(identity: Identity, config: ReaderConfig) -> Float[Array, " i"]:
    parts = [(getattr(identity, name) - mean) / scale for name, (mean, scale) in config.identity.items()]
    return jnp.concatenate([jnp.atleast_1d(part) for part in parts])


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
        self._read = jax.jit(lambda params, video: apply(model.bind(params), resized(video.astype(jnp.float32) / 127.5 - 1.0)))

    def __call__(self, frames: UInt8[np.ndarray, "n s s 3"]) -> Reading:
        """Reads every picture; those of another size than 256x256 are brought to it.

        Raises:
          ValueError: the pictures are not uint8, not square, or smaller than 64x64, where lips are no more than a line.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1] != frames.shape[2] or frames.shape[3] != 3 or not len(frames):
            raise ValueError(
                f"the estimator reads square uint8 pictures [n, s, s, 3] with n >= 1, got {frames.dtype} {list(frames.shape)}: crop or convert them"
            )
        if frames.shape[1] < SMALLEST:
            raise ValueError(f"pictures of {frames.shape[1]} pixels each way are too small to read a face from: give at least {SMALLEST}")
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
