"""When somebody speaks into an open microphone, so that silence is not queued as if it were speech.

A microphone's sound never ends. Pushed whole it would be one endless utterance, and whatever it is late by once it would be late by for ever. What
is passed on is what is louder than the room, with a little before and after it; every pause ends an utterance, and with it any backlog.
"""

from collections import deque

import numpy as np
from jaxtyping import Float32

STRETCH = 0.02  # seconds that are judged together
BEFORE, AFTER = 0.2, 0.5  # seconds passed on around what is loud
ABOVE = 10.0  # dB above the room at which somebody speaks
QUIETEST = -50.0  # dBFS below which nobody does


class SpeechGate:
    """Sound in, speech out.

    The room is the quietest of the last seconds: its level falls at once and rises by 3 dB a second.
    """

    def __init__(self, rate: int):
        self._size = round(STRETCH * rate)
        self._rest = np.zeros(0, np.float32)
        self._before: deque[np.ndarray] = deque(maxlen=round(BEFORE / STRETCH))
        self._quiet_for = np.inf
        self._room = -60.0

    @property
    def open(self) -> bool:
        """Whether somebody speaks."""
        return self._quiet_for < AFTER

    def push(self, sound: Float32[np.ndarray, " n"]) -> tuple[Float32[np.ndarray, " m"], bool]:
        """What is to be said of it, and whether an utterance ends with it."""
        sound = np.concatenate([self._rest, sound])
        whole = len(sound) // self._size * self._size
        self._rest = sound[whole:]
        passed, ended = [], False
        for stretch in sound[:whole].reshape(-1, self._size):
            level = 10 * np.log10(np.mean(stretch**2) + 1e-10)
            loud = level > max(QUIETEST, self._room + ABOVE)
            self._room = min(level, self._room + 3.0 * STRETCH) if not loud else self._room + 3.0 * STRETCH
            was_open = self.open
            self._quiet_for = 0.0 if loud else self._quiet_for + STRETCH
            if self.open:
                passed += [*self._before, stretch]
                self._before.clear()
                ended = False
            else:
                ended = ended or was_open
                self._before.append(stretch)
        return np.concatenate([np.zeros(0, np.float32), *passed]), ended
