"""Clips to measure: made by the generator chunk by chunk, as a live stream is, or drawn from the truth for comparison."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import ArrayLike

from pikastream_jax.data.face import Identity
from pikastream_jax.measuring.estimator import Estimator, Reading
from pikastream_jax.measuring.subjects import (
    TrueCurves,
    draw,
    excerpt,
    film,
    person,
    portrait_state,
    true_curves,
    true_motion,
)

KEPT = 8  # frames of every clip that are kept for the contact sheet
CORNER = 1 / 8  # of the picture's width: side of the boxes in the upper corners, where the background never moves


class StreamSession(Protocol):
    """One stream of one face."""

    def step(self, audio: Float[np.ndarray, " n"]) -> ArrayLike: ...

    def finish(self) -> Iterable[ArrayLike]: ...


class TalkingFace(Protocol):
    """What is measured; `pikastream_jax.streaming.generator.Generator` is one."""

    height: int  # pixels of the square pictures that it takes and makes
    chunk_frames: int  # video frames that a step makes

    def session(self, image: UInt8[np.ndarray, "h w 3"], prompt: str, seed: int) -> StreamSession: ...

    def chunk_samples(self, index: int) -> int: ...

    def reconstruct(self, video: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t h w 3"]: ...


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a clip is made from, and what it should show."""

    seed: int  # of the person, the portrait and the motion
    prompt: str
    identity: Identity
    reference: UInt8[np.ndarray, "s s 3"]
    audio: Float[np.ndarray, " n"]
    truth: TrueCurves


Filmer = Callable[[Scene], UInt8[np.ndarray, "t s s 3"]]


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip, read. Its frames are gone but for a few: a long evaluation must fit into memory."""

    scene: Scene
    reading: Reading
    frames: UInt8[np.ndarray, "8 s s 3"]  # evenly spread
    background_change: float  # see `background_change`


def samples_of(face: TalkingFace, chunks: int) -> int:
    """Samples of sound that `chunks` chunks take."""
    return sum(face.chunk_samples(i) for i in range(chunks))


def make_scene(seed: int, prompt: str, speech: list[Float[np.ndarray, " n"]], index: int, samples: int, size: int = 256) -> Scene:
    """The person of `seed`, `size` pixels each way, with excerpt `index` of the speech."""
    identity = person(seed)
    audio = excerpt(speech, index, samples)
    return Scene(seed, prompt, identity, draw(identity, portrait_state(seed), size), audio, true_curves(identity, audio))


def generated(face: TalkingFace) -> Filmer:
    """Clips by the generator."""

    def make(scene: Scene) -> UInt8[np.ndarray, "t s s 3"]:
        session = face.session(scene.reference, scene.prompt, scene.seed)
        chunks, at = [], 0
        while at < len(scene.audio):
            count = face.chunk_samples(len(chunks))
            chunks.append(session.step(scene.audio[at : at + count]))
            at += count
        return np.concatenate([*chunks, *session.finish()])

    return make


def true(face: TalkingFace) -> Filmer:
    """Drawn clips passed through FlashVAE: the best that a generator of its latents could do."""

    def make(scene: Scene) -> UInt8[np.ndarray, "t s s 3"]:
        motion = true_motion(scene.seed, scene.prompt, scene.truth.track)
        return face.reconstruct(film(scene.identity, motion, face.height))

    return make


def make_clip(scene: Scene, filmer: Filmer, estimator: Estimator) -> Clip:
    """Makes one clip and reads every frame.

    Raises:
      ValueError: the clip has not as many frames as its sound.
    """
    frames = filmer(scene)
    if len(frames) != len(scene.truth.opening):
        raise ValueError(
            f"{len(frames)} frames for {len(scene.truth.opening)} frames of sound: the generator is out of step"
        )
    kept = np.linspace(0, len(frames) - 1, KEPT).round().astype(int)
    return Clip(scene, estimator(frames), frames[kept], background_change(frames))


def background_change(frames: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Flicker: mean absolute difference of successive frames where a still camera sees nothing move, in 8-bit levels."""
    return change(corners(frames))


def change(frames: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Mean absolute difference of successive frames, in 8-bit levels."""
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())


def corners(frames: UInt8[np.ndarray, "*t h w 3"]) -> UInt8[np.ndarray, "*t e f 3"]:
    """The boxes in the two upper corners, side by side."""
    edge = round(CORNER * frames.shape[-2])
    return np.concatenate([frames[..., :edge, :edge, :], frames[..., :edge, -edge:, :]], axis=-2)
