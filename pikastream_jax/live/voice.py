"""What a session is to say: sound of any rate pushed at any speed, taken chunk by chunk on one clock of samples.

Speech is taken in whole chunks. Sound that arrives as it is spoken comes in small pieces; a chunk for which there is not enough of it yet is a
silent one, and what is there waits for the next, so that no word is cut up by silence. Once an utterance is said to be over, its rest is taken
with silence after it.
"""

import dataclasses
import threading
from collections import deque

import numpy as np
from jaxtyping import Float32

from pikastream_jax.serving.resample import StreamResampler

SOUND_RATE = 48_000  # Hz of what the viewer hears
MIN_RATE, MAX_RATE = 8_000, 192_000
LIMIT = 120.0  # seconds of speech that may wait


class VoiceFull(Exception):
    """So much speech waits that no more is taken; try again when some of it has been spoken."""


@dataclasses.dataclass(frozen=True)
class Said:
    """The sound of one chunk."""

    speech: Float32[np.ndarray, " n"]  # at the model's rate
    sound: Float32[np.ndarray, " m"]  # the same stretch at SOUND_RATE
    spoken: int  # samples of `sound`, from its start, that were pushed; the rest is silence
    ends: bool  # an utterance ends in this chunk
    pushed: float | None = None  # when the first sound was, of an utterance that begins in this chunk


@dataclasses.dataclass
class _Utterance:
    """Sound that belongs together, resampled as it comes; both buffers hold the same stretch."""

    sound: list[np.ndarray] = dataclasses.field(default_factory=list)
    samples: int = 0  # of `sound`
    over: bool = False
    pushed: float | None = None  # when its first sound was, until that is taken


class Voice:
    """Speech that waits. Pushed by one thread, taken by another.

    Args:
      model_rate: Hz of what the model hears; divides SOUND_RATE.
      limit: seconds that may wait.

    Raises:
      ValueError: `model_rate` does not divide SOUND_RATE.
    """

    def __init__(self, model_rate: int, limit: float = LIMIT):
        if SOUND_RATE % model_rate:
            raise ValueError(f"a model that hears {model_rate} Hz cannot be fed from {SOUND_RATE} Hz: use a rate that divides it")
        self._model_rate, self._limit = model_rate, limit
        self._waiting: deque[_Utterance] = deque()
        self._to_sound: StreamResampler | None = None
        self._rate = 0
        self._to_model = StreamResampler(SOUND_RATE, model_rate, 1)
        self._heard = np.zeros(0, np.float32)  # at the model's rate, of sound that is not taken yet
        self._lock = threading.Lock()

    def push(self, samples: Float32[np.ndarray, " n"], rate: int, now: float = 0.0) -> None:
        """Adds to the utterance that is under way, or begins one.

        Args:
          now: seconds of any clock, to tell how long an utterance waited.

        Raises:
          ValueError: a rate that no sound has, another rate in mid-utterance, or samples that are no numbers.
          VoiceFull: more waits than the limit.
        """
        if not MIN_RATE <= rate <= MAX_RATE:
            raise ValueError(f"sound of {rate} Hz cannot be used: send {MIN_RATE} to {MAX_RATE} Hz")
        samples = np.asarray(samples, np.float32)
        if not np.isfinite(samples).all():
            raise ValueError("the sound holds values that are no numbers: send finite samples in [-1, 1]")
        samples = np.clip(samples, -1.0, 1.0)
        if not len(samples):
            return
        with self._lock:
            if self._seconds() + len(samples) / rate > self._limit:
                raise VoiceFull(f"{self._seconds():.0f} s of speech wait already, the limit is {self._limit:.0f} s: send it as it is spoken, or wait")
            if self._to_sound is None:
                self._to_sound, self._rate = StreamResampler(rate, SOUND_RATE, 1), rate
                self._waiting.append(_Utterance(pushed=now))
            elif rate != self._rate:
                raise ValueError(f"this utterance began with {self._rate} Hz and goes on with {rate} Hz: end it first")
            self._add(self._to_sound.push(samples[:, None])[:, 0])

    def end(self) -> None:
        """The utterance is complete."""
        with self._lock:
            self._end()

    def clear(self) -> float:
        """Drops everything that waits. Returns its seconds."""
        with self._lock:
            dropped = self._seconds()
            self._waiting.clear()
            self._to_sound = None
            return dropped

    @property
    def seconds(self) -> float:
        """How much waits."""
        with self._lock:
            return self._seconds()

    def ready(self, seconds: float) -> bool:
        """Whether an utterance waits that has not begun, and is complete or has `seconds` of sound."""
        with self._lock:
            if not self._waiting or self._waiting[0].pushed is None:
                return False
            return self._waiting[0].over or self._waiting[0].samples >= seconds * SOUND_RATE

    def take(self, model_samples: int) -> Said:
        """The sound of the next chunk, silence included."""
        size = model_samples * (SOUND_RATE // self._model_rate)
        with self._lock:
            sound, ends = np.zeros(size, np.float32), False
            spoken, pushed = 0, None
            if self._waiting:
                utterance = self._waiting[0]
                if utterance.over or utterance.samples >= size:
                    pieces = np.concatenate([*utterance.sound, np.zeros(0, np.float32)])
                    taken, rest = pieces[:size], pieces[size:]
                    spoken = len(taken)
                    pushed, utterance.pushed = utterance.pushed, None
                    sound[:spoken] = taken
                    utterance.sound, utterance.samples = [rest], len(rest)
                    if utterance.over and not len(rest):
                        self._waiting.popleft()
                        ends = True
            # One resampler for all that is taken, silence too: to the model the sound is one stream without seams.
            self._heard = np.concatenate([self._heard, self._to_model.push(sound[:, None])[:, 0]])
            speech, self._heard = self._heard[:model_samples], self._heard[model_samples:]
            if len(speech) < model_samples:  # the resampler holds back up to 2 ms, once
                speech = np.pad(speech, (model_samples - len(speech), 0))
            return Said(speech, sound, spoken, ends, pushed)

    def _add(self, sound: Float32[np.ndarray, " n"]) -> None:
        self._waiting[-1].sound.append(np.ascontiguousarray(sound))
        self._waiting[-1].samples += len(sound)

    def _end(self) -> None:
        if self._to_sound is not None:
            self._add(self._to_sound.finish()[:, 0])
            self._to_sound = None
            self._waiting[-1].over = True

    def _seconds(self) -> float:
        return sum(utterance.samples for utterance in self._waiting) / SOUND_RATE
