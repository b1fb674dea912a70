"""A model whose pictures say what it was told: its state's face, prompt, chunk, and how loud the sound was."""

import time

import numpy as np


class FakeModel:
    """Pictures of one colour: every one is filled with (face, prompt's length, 255 * loudness); a step sleeps for `seconds`."""

    fps, sample_rate, chunk_frames, load = 25, 16_000, 4, 0.85

    def __init__(self, seconds: float = 0.0, rows: int = 1, size: int = 16):
        self.seconds, self.rows = seconds, rows
        self.height = self.width = size
        self.steps: list[list[int]] = []  # chunks of every step, by row
        self.fail_at: int | None = None
        self.heard: list[np.ndarray] = []

    def chunk_samples(self, index):
        return 2560

    def start(self, image, prompt, seed):
        return {"face": int(image[0, 0, 0]), "prompt": prompt, "chunk": 0}

    def prompt_change(self, prompt):
        return lambda state: state | {"prompt": prompt}

    def reference_change(self, image):
        return lambda state: state | {"face": int(image[0, 0, 0])}

    def step(self, streams):
        self.steps.append([chunk for _, chunk, _ in streams])
        if self.fail_at is not None and len(self.steps) >= self.fail_at:
            raise FloatingPointError("no numbers")
        if self.seconds:
            time.sleep(self.seconds)
        frames = np.zeros((len(streams), 4, self.height, self.width, 3), np.uint8)
        states = []
        for row, (state, chunk, sound) in enumerate(streams):
            assert sound.shape == (2560,)
            self.heard.append(sound)
            frames[row] = state["face"], len(state["prompt"]), np.round(255 * np.abs(sound).max())
            states.append(state | {"chunk": chunk + 1})
        return states, frames


def picture(face):
    return np.full((16, 16, 3), face, np.uint8)
