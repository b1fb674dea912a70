"""Whom and what is measured: held-out people, their portraits, prompts, speech, and the truth that goes with it."""

import dataclasses
import functools
from math import gcd
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray, UInt8

from pikastream_jax.data.captions import CANONICAL, style_from_caption_attributes
from pikastream_jax.data.face import (
    FaceState,
    Identity,
    map_renders,
    neutral_state,
    render,
    sample_identity,
    true_mouth,
)
from pikastream_jax.data.motion import SpeechTrack, style_motion
from pikastream_jax.data.speech import SAMPLE_RATE, mouth_tracks, normalise_level

FPS = 25
HELD_OUT_IDENTITIES = 9_000_000  # first seed of the default people; training draws from keys folded out of small seeds
SPEECH = Path(__file__).resolve().parent.parent / "assets" / "speech" / "june_fr.flac"  # a voice held out of training
NEUTRAL = "a person with a neutral expression, looking at the camera"
SMILING = "a person smiling warmly, looking at the camera"


@dataclasses.dataclass(frozen=True)
class TrueCurves:
    """What the mouth should do while a piece of speech is heard; one value per video frame."""

    opening: Float[np.ndarray, " t"]  # 0 closed .. 1
    width: Float[np.ndarray, " t"]  # fraction of the height of the face, of a face that does not smile
    track: SpeechTrack


def person(seed: int) -> Identity:
    """The person of a seed."""
    return _sample(jax.random.key(seed))


def portrait_state(seed: int) -> FaceState:
    """How a person sits for the reference picture: eyes open, mouth closed, head turned a little."""
    rng = np.random.default_rng(seed)
    limits = {"yaw": 0.10, "pitch": 0.05, "roll": 0.05, "gaze_x": 0.12, "gaze_y": 0.08}
    drawn = {name: jnp.float32(rng.uniform(-limit, limit)) for name, limit in limits.items()}
    return dataclasses.replace(neutral_state(), smile=jnp.float32(rng.uniform(0.0, 0.4)), **drawn)


def draw(identity: Identity, state: FaceState, size: int = 256) -> UInt8[np.ndarray, "s s 3"]:
    """One picture of `size` pixels each way, 8 bits."""
    return np.asarray(_draw(identity, state, size))


def film(identity: Identity, states: FaceState, size: int = 256) -> UInt8[np.ndarray, "t s s 3"]:
    """A clip of states with leaves ``[t]``, 8 bits."""
    return np.asarray(_film(identity, states, size))


def read_speech(path: Path) -> Float[np.ndarray, " n"]:
    """A file of any rate and channel count as 16 kHz mono at the level that the analysis expects.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a sound file, or shorter than 2 seconds.
    """
    import soundfile  # here, so that the measures themselves need no codec

    if not Path(path).is_file():
        raise FileNotFoundError(f"no speech at {path}")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not a sound file that can be read ({error}): give WAV, FLAC or OGG") from error
    mono = samples.mean(axis=1)
    if rate != SAMPLE_RATE:
        from scipy.signal import resample_poly

        common = gcd(rate, SAMPLE_RATE)
        mono = resample_poly(mono, SAMPLE_RATE // common, rate // common).astype(np.float32)
    if len(mono) < 2 * SAMPLE_RATE:
        raise ValueError(f"{path} lasts {len(mono) / SAMPLE_RATE:.1f} s: give at least 2 s of speech")
    return normalise_level(mono)


def excerpt(speech: list[Float[np.ndarray, " n"]], index: int, samples: int) -> Float[np.ndarray, " m"]:
    """A piece of `samples` samples, another for every index, files in turn; the file is repeated where it is too short."""
    voice = speech[index % len(speech)]
    # The golden ratio spreads the beginnings evenly, however many are taken.
    begin = int((index // len(speech)) * 0.618034 % 1.0 * len(voice))
    return voice[np.arange(begin, begin + samples) % len(voice)]


def true_curves(identity: Identity, audio: Float[np.ndarray, " n"]) -> TrueCurves:
    """The truth of one clip from its sound alone, as the model hears it: nothing before its beginning."""
    track = mouth_tracks(audio, FPS)
    frames = len(track.mouth_open)
    still = dataclasses.replace(
        neutral_state(frames), mouth_open=jnp.asarray(track.mouth_open), mouth_width=jnp.asarray(track.mouth_width)
    )
    return TrueCurves(np.asarray(track.mouth_open), mouth_of(identity, still)[1], track)


def mouth_of(identity: Identity, states: FaceState) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """`true_mouth` of a clip of states with leaves ``[t]``: opening and width as fractions of the height of the face."""
    opening, width = _mouth(identity, states)
    return np.asarray(opening), np.asarray(width)


def true_motion(seed: int, prompt: str, track: SpeechTrack) -> FaceState:
    """How a person who acts on a prompt of `CANONICAL` moves to a speech track; leaves ``[t]``.

    Raises:
      ValueError: the prompt's meaning is not known.
    """
    if prompt not in CANONICAL:
        raise ValueError(f"prompt {prompt!r} has no known motion: use one of {'; '.join(CANONICAL)}")
    k_style, k_motion = jax.random.split(jax.random.key(seed))
    style = style_from_caption_attributes(CANONICAL[prompt], k_style)
    return _motion(k_motion, style, jax.tree.map(jnp.asarray, track))


@jax.jit
def _sample(key: PRNGKeyArray) -> Identity:
    return sample_identity(key)


@jax.jit
def _motion(key, style, track):
    return style_motion(key, style, track, FPS)


@jax.jit
def _mouth(identity, states):
    return true_mouth(identity, states)


def _bytes(picture):
    return jnp.round((picture + 1.0) * 127.5).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=2)
def _draw(identity, state, size):
    return _bytes(render(identity, state, size=size))


@functools.partial(jax.jit, static_argnums=2)
def _film(identity, states, size):
    return map_renders(lambda state: _bytes(render(identity, state, size=size)), states)
