"""A generator that cheats: it knows who is in the picture and draws the truth, so that every measure has a known answer."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pikastream_jax.data.face import neutral_state
from pikastream_jax.data.speech import mouth_tracks
from pikastream_jax.measuring.subjects import film, person

CHUNK = 7680  # samples of 12 frames


class TruthFace:
    """Draws the person of the session's seed with the lips of the sound; smiles when told to."""

    chunk_frames = 12

    def __init__(self, delay: int = 0, person_offset: int = 0, height: int = 256):
        self.delay, self.person_offset, self.height = delay, person_offset, height

    def session(self, image, prompt, seed):
        return _Session(self, person(seed + self.person_offset), 0.8 if "smil" in prompt else 0.0)

    def chunk_samples(self, index):
        return CHUNK

    def reconstruct(self, video):
        return video


class _Session:
    def __init__(self, face, identity, smile):
        self.face, self.identity, self.smile = face, identity, smile
        self.audio = np.zeros(0, np.float32)

    def step(self, audio):
        self.audio = np.concatenate([self.audio, audio])
        track = mouth_tracks(self.audio, 25)
        at = np.maximum(np.arange(len(track.mouth_open) - 12, len(track.mouth_open)) - self.face.delay, 0)
        states = dataclasses.replace(
            neutral_state(12),
            mouth_open=jnp.asarray(track.mouth_open[at]),
            mouth_width=jnp.asarray(track.mouth_width[at]),
            smile=jnp.full(12, self.smile),
        )
        return film(self.identity, states, self.face.height)

    def finish(self):
        return []
