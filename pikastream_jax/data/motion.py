"""How a face moves while it speaks or listens: from a style and a speech track to one face state per video frame.

Head, eyes, lids and brows are random processes built from a few sinusoids and events, all pure functions of a key; the
style sets their means and amplitudes, the speech drives the mouth and, when it gets excited, nods and brows.

Left and right are those of the picture: a gaze of -1 looks at the picture's left edge.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pikastream_jax.data.face_pose import FaceState

_NOD_HERTZ = (1.4, 2.1)
_BLINK_EVERY = (2.0, 5.0)  # seconds
_BLINK_LASTS = (0.15, 0.25)
_GAZE_HOLDS = (0.7, 2.6)
CHANGE_LASTS = 0.4  # seconds that a face takes to change its manner
EYE_PER_RADIAN = 2.2  # gaze units that turn the eye by one radian: keeps the eyes on target while the head turns


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Style:
    """The manner of one clip. Every field is a float32 scalar (or has leading axes: clips, or the frames of one clip)."""

    happy: Float[Array, "*b"]  # 0 .. 1
    sad: Float[Array, "*b"]  # 0 .. 1
    angry: Float[Array, "*b"]  # 0 .. 1
    surprised: Float[Array, "*b"]  # 0 .. 1
    head_activity: Float[Array, "*b"]  # 0 still .. 1 lively
    nod: Float[Array, "*b"]  # -1 shakes the head .. 0 neither .. 1 nods
    gaze_x: Float[Array, "*b"]  # where the eyes rest: 0 the camera, -1 left .. 1 right
    gaze_y: Float[Array, "*b"]  # -1 up .. 1 down
    tilt: Float[Array, "*b"]  # head tilted to the left -1 .. 1 to the right
    energy: Float[Array, "*b"]  # 0 calm .. 1 energetic


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpeechTrack:
    """What speech does to the face, one value per video frame."""

    mouth_open: Float[Array, " t"]  # 0 lips closed .. 1
    mouth_width: Float[Array, " t"]  # -1 pursed .. 1 spread
    tongue: Float[Array, " t"]  # 0 .. 1
    activity: Float[Array, " t"]  # 0 silence .. 1 voice, smoothed causally
    excitement: Float[Array, " t"]  # 0 .. 1, loud and lively speech


def sample_style(key: PRNGKeyArray) -> Style:
    """A random manner: one emotion or none, a gaze that mostly rests on the camera, any liveliness."""
    keys = jax.random.split(key, 10)
    emotion = jax.random.categorical(keys[0], jnp.log(jnp.asarray([0.32, 0.28, 0.13, 0.13, 0.14])))
    # A weak smile is a smile; the other emotions need some strength to be seen.
    strength = jax.random.uniform(keys[1], minval=jnp.where(emotion == 1, 0.3, 0.5), maxval=1.0)
    happy, sad, angry, surprised = (jnp.where(emotion == n, strength, 0.0) for n in (1, 2, 3, 4))
    away = jax.random.uniform(keys[2]) < 0.4
    direction = jax.random.randint(keys[3], (), 0, 4)
    reach = jnp.where(away, jax.random.uniform(keys[4], minval=0.55, maxval=1.0), 0.0)
    gaze_x = reach * jnp.asarray([-1.0, 1.0, 0.0, 0.0])[direction]
    gaze_y = reach * jnp.asarray([0.0, 0.0, -1.0, 1.0])[direction]
    gesture = jax.random.uniform(keys[5])
    size = jax.random.uniform(keys[6], minval=0.5, maxval=1.0)
    nod = jnp.where(gesture < 0.22, size, jnp.where(gesture < 0.40, -size, 0.0))
    lean = jax.random.uniform(keys[7], minval=-1.0, maxval=1.0)
    tilt = jnp.where(jnp.abs(lean) > 0.6, lean, 0.0)
    values = (happy, sad, angry, surprised, jax.random.uniform(keys[8]), nod, gaze_x, gaze_y, tilt,
              jax.random.uniform(keys[9]))  # fmt: skip
    return Style(*(jnp.asarray(value, jnp.float32) for value in values))


def changed_style(
    first: Style, second: Style, change: Int[Array, ""], frames: int, fps: float, seconds: float = CHANGE_LASTS
) -> Style:
    """One manner that turns into another, as when a prompt is changed in mid-stream.

    Args:
      first, second: scalar leaves.
      change: video frame at which ``second`` begins to be seen; ``frames`` or more for never.
      frames: T.
      seconds: until nothing is left of ``first``.

    Returns:
      The manner of each video frame, leaves ``[T]``.
    """
    x = jnp.clip((jnp.arange(frames) - change + 1) / (seconds * fps), 0.0, 1.0)
    share = x * x * (3.0 - 2.0 * x)
    return jax.tree.map(lambda a, b: a + share * (b - a), first, second)


def style_motion(key: PRNGKeyArray, style: Style, speech: SpeechTrack, fps: float) -> FaceState:
    """Move the face in ``style`` to ``speech``.

    Args:
      key: of all that is random in the motion; the same key gives the same motion.
      style: leaves scalar, or ``[T]`` where the manner changes (`changed_style`).
      speech: leaves ``[T]`` at ``fps`` frames a second; T is static.
      fps: video frames a second, a positive Python number (it decides shapes, so it cannot be traced).

    Returns:
      The face state of each frame, leaves ``[T]``. The mouth's opening, width and tongue are the speech track's own;
      the style only moves the corners of the mouth.
    """
    if fps <= 0:
        raise ValueError(f"fps={fps} must be positive, for example 25")
    frames = speech.mouth_open.shape[0]
    t = jnp.arange(frames, dtype=jnp.float32) / fps
    keys = iter(jax.random.split(key, 24))
    energy = 0.5 + 0.8 * style.energy
    liveliness = 0.25 + 1.0 * style.head_activity
    talking = _trailing_mean(speech.activity, 0.25, fps)
    excited = _trailing_mean(speech.excitement, 0.16, fps)
    accent = jnp.maximum(excited - _trailing_mean(speech.excitement, 0.7, fps), 0.0)

    slow = liveliness * (0.6 + 0.4 * talking)
    quick = liveliness * energy * talking
    # Standard deviations of 1 degree (still) to 4 degrees (lively and energetic): what the head does by itself no model can foretell, and
    # the more of it there is, the less of a clip's error is left for the face.
    yaw = slow * 0.045 * _drift(next(keys), t, 0.07, 0.35) + quick * 0.03 * _drift(next(keys), t, 0.4, 1.3)
    pitch = slow * 0.02 * _drift(next(keys), t, 0.07, 0.35) + quick * 0.018 * _drift(next(keys), t, 0.5, 1.6)
    roll = slow * 0.02 * _drift(next(keys), t, 0.07, 0.30) + quick * 0.012 * _drift(next(keys), t, 0.4, 1.2)
    pitch = pitch + 0.10 * accent * energy

    nods, shakes = jnp.maximum(style.nod, 0.0), jnp.maximum(-style.nod, 0.0)
    # A nodding style nods most of the time; a listener nods a little now and then, whatever the style.
    burst = _bursts(next(keys), t, -0.55)
    listening = (1.0 - talking) * _bursts(next(keys), t, 0.35)
    pitch = pitch + (0.08 * nods * burst + 0.030 * listening) * _swing(next(keys), t)
    yaw = yaw + 0.10 * shakes * burst * _swing(next(keys), t)
    yaw = yaw + 0.17 * style.gaze_x
    pitch = pitch + 0.11 * style.gaze_y + 0.04 * style.sad - 0.03 * style.surprised
    roll = roll + 0.15 * style.tilt
    yaw, pitch, roll = _bounded(yaw, 0.35), _bounded(pitch, 0.25), _bounded(roll, 0.20)

    look_x, look_y = _saccades(next(keys), t, fps)
    gaze_x = style.gaze_x + 0.9 * look_x - EYE_PER_RADIAN * (yaw - 0.17 * style.gaze_x)
    gaze_y = style.gaze_y + 0.6 * look_y - EYE_PER_RADIAN * (pitch - 0.11 * style.gaze_y)

    brow_raise = 0.85 * style.surprised - 0.25 * style.angry + 0.55 * excited * energy
    brow_raise = brow_raise + 0.16 * talking * energy * _drift(next(keys), t, 0.3, 1.1)
    smile = 0.85 * style.happy - 0.85 * style.sad - 0.40 * style.angry
    smile = smile + 0.30 * excited * (1.0 - style.sad) * (1.0 - style.angry)
    smile = smile + 0.10 * (1.0 - 0.5 * talking) * _drift(next(keys), t, 0.08, 0.3)
    furrow = 0.95 * style.angry + 0.15 * style.sad + 0.05 * _drift(next(keys), t, 0.1, 0.4)
    phase = jax.random.uniform(next(keys), maxval=2.0 * math.pi)
    # The integral of the frequency, so that a change of manner does not make the chest jump.
    cycles = jnp.cumsum(jnp.broadcast_to(0.24 + 0.10 * style.energy, t.shape)) / fps
    breath = jnp.sin(2.0 * math.pi * cycles + phase)
    shift_x = 0.010 * slow * _drift(next(keys), t, 0.06, 0.25)
    shift_y = 0.006 * slow * _drift(next(keys), t, 0.06, 0.25)
    return FaceState(
        yaw=yaw, pitch=pitch, roll=roll, shift_x=shift_x, shift_y=shift_y,
        gaze_x=jnp.clip(gaze_x, -1.0, 1.0), gaze_y=jnp.clip(gaze_y, -1.0, 1.0), blink=_blinks(next(keys), t, fps),
        brow_raise=jnp.clip(brow_raise, -1.0, 1.0), brow_furrow=jnp.clip(furrow, 0.0, 1.0),
        smile=jnp.clip(smile, -1.0, 1.0), mouth_open=speech.mouth_open, mouth_width=speech.mouth_width,
        tongue=speech.tongue, breath=0.8 * breath,
    )  # fmt: skip


def _bounded(angle: Array, limit: float) -> Array:
    """Soft limit: the identity for small angles, never beyond ``limit``."""
    return limit * jnp.tanh(angle / limit)


def _drift(key: PRNGKeyArray, t: Array, low: float, high: float, waves: int = 4) -> Array:
    """Smooth random process of standard deviation about 1, with frequencies between ``low`` and ``high`` Hz."""
    frequency_key, phase_key = jax.random.split(key)
    frequency = jax.random.uniform(frequency_key, (waves,), minval=low, maxval=high)
    phase = jax.random.uniform(phase_key, (waves,), maxval=2.0 * math.pi)
    return jnp.sin(2.0 * math.pi * frequency * t[:, None] + phase).sum(-1) * math.sqrt(2.0 / waves)


def _bursts(key: PRNGKeyArray, t: Array, threshold: float) -> Array:
    """On and off, 0..1, a second or two each; a higher ``threshold`` is on less often."""
    x = jnp.clip((_drift(key, t, 0.10, 0.35) - threshold) / 0.5, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _swing(key: PRNGKeyArray, t: Array) -> Array:
    """The oscillation of a nod or a shake, -1..1."""
    frequency_key, phase_key = jax.random.split(key)
    frequency = jax.random.uniform(frequency_key, minval=_NOD_HERTZ[0], maxval=_NOD_HERTZ[1])
    return jnp.sin(2.0 * math.pi * frequency * t + jax.random.uniform(phase_key, maxval=2.0 * math.pi))


def _event_times(key: PRNGKeyArray, seconds: float, every: tuple[float, float]) -> Array:
    """Onsets ``[n]`` in seconds, ``every`` so often, from before the clip to its end, so that no frame is special."""
    low, high = every
    count = math.ceil((seconds + 2.0 * high) / low) + 1
    start_key, gap_key = jax.random.split(key)
    start = -high - jax.random.uniform(start_key, maxval=high)
    return start + jnp.cumsum(jax.random.uniform(gap_key, (count,), minval=low, maxval=high))


def _blinks(key: PRNGKeyArray, t: Array, fps: float) -> Array:
    """Lids 0 open .. 1 closed: they close fast, stay a moment and open more slowly."""
    time_key, length_key = jax.random.split(key)
    onset = _event_times(time_key, len(t) / fps, _BLINK_EVERY)
    length = jax.random.uniform(length_key, onset.shape, minval=_BLINK_LASTS[0], maxval=_BLINK_LASTS[1])
    phase = (t[:, None] - onset) / length
    closing, opening = phase / 0.30, (1.0 - phase) / 0.42
    return jnp.clip(jnp.minimum(closing, opening), 0.0, 1.0).max(-1)


def _saccades(key: PRNGKeyArray, t: Array, fps: float) -> tuple[Array, Array]:
    """Jumps of the eyes away from where they rest, and back; at rest two thirds of the time."""
    time_key, rest_key, x_key, y_key = jax.random.split(key, 4)
    onset = _event_times(time_key, len(t) / fps, _GAZE_HOLDS)
    away = jax.random.uniform(rest_key, onset.shape) > 0.66
    # Even at rest the eyes are never quite still.
    reach = jnp.where(away, 0.55, 0.05)
    x = reach * jax.random.uniform(x_key, onset.shape, minval=-1.0, maxval=1.0)
    y = reach * jax.random.uniform(y_key, onset.shape, minval=-1.0, maxval=1.0)
    index = (t[:, None] >= onset).sum(-1) - 1
    return _trailing_mean(x[index], 0.06, fps), _trailing_mean(y[index], 0.06, fps)


def _trailing_mean(x: Float[Array, " t"], seconds: float, fps: float) -> Float[Array, " t"]:
    """Mean over the last ``seconds``; before the start the first value is repeated."""
    taps = max(1, round(seconds * fps))
    padded = jnp.concatenate([jnp.full((taps - 1,), x[0]), x])
    return jnp.convolve(padded, jnp.full((taps,), 1.0 / taps), mode="valid")
