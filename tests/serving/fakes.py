"""A generator that costs nothing and whose pictures can be measured: brightness is the loudness of the sound."""

import sys
import time

import numpy as np

from pikastream_jax.serving.command import main


class FakeSession:
    def __init__(self, generator: "FakeGenerator", image: np.ndarray):
        self.generator = generator
        self.reconstruction_psnr = 12.0 if image.std() < 1 else 35.0  # a flat picture is no face
        self.index = 0

    def step(self, audio: np.ndarray) -> np.ndarray:
        generator = self.generator
        assert audio.dtype == np.float32 and audio.shape == (generator.chunk_samples(self.index),)
        self.index += 1
        generator.steps += 1
        time.sleep(generator.step_seconds)
        loudness = np.abs(audio.reshape(generator.chunk_frames, -1)).max(axis=1)
        frames = np.zeros((generator.chunk_frames, generator.height, generator.width, 3), np.uint8)
        top, left = generator.height // 4, generator.width // 4
        frames[:, top:-top, left:-left] = (loudness * 255).astype(np.uint8)[:, None, None, None]
        return frames

    def finish(self) -> list[np.ndarray]:
        return []


class FakeGenerator:
    fps, sample_rate, chunk_frames, psnr_warning = 25, 16_000, 12, 20.0

    def __init__(self, weights=None, step_seconds: float = 0.0, height: int = 256, width: int = 256):
        if weights is not None and not weights.exists():
            raise FileNotFoundError(f"no weights at {weights}")
        self.step_seconds, self.steps = step_seconds, 0
        self.height, self.width = height, width

    def chunk_samples(self, index: int) -> int:
        return 7680

    def session(self, image: np.ndarray, prompt: str, seed: int) -> FakeSession:
        assert image.shape == (self.height, self.width, 3) and image.dtype == np.uint8
        return FakeSession(self, image)


if __name__ == "__main__":  # python fakes.py STEP_SECONDS ARGUMENTS...: serve.py with this generator
    pause = float(sys.argv[1])
    sys.exit(main(sys.argv[2:], lambda weights=None: FakeGenerator(weights, pause)))
