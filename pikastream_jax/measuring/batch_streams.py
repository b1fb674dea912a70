"""Streams of several people side by side, as the rows of one state: what takes minutes for one takes hardly longer for eight."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from pikastream_jax.audio.slices import chunk_sample_counts, max_chunk_samples
from pikastream_jax.dit.model import KeysValues
from pikastream_jax.measuring.estimator import Estimator, Reading
from pikastream_jax.streaming.generator import Generator
from pikastream_jax.streaming.state import StepInputs, install_prompt, install_reference, join_rows


class BatchStream:
    """Streams of b people at once; the row of a person does not depend on the other rows."""

    def __init__(self, generator: Generator, images: Sequence[UInt8[np.ndarray, "h w 3"]], prompts: Sequence[str], seeds: Sequence[int]):
        """One image, prompt and seed for each stream.

        Raises:
          ValueError: a picture of another size than the generator's.
        """
        self.generator = generator
        self.rows = len(images)
        self.chunk = 0
        self.step_seconds: list[float] = []  # of every step so far; the first may compile
        starts = [
            generator.start(generator.encode_reference(image), generator.encode_prompt(prompt), seed)
            for image, prompt, seed in zip(images, prompts, seeds, strict=True)
        ]
        self._state = join_rows(starts)

    def step(self, audio: Float[np.ndarray, "b n"]) -> UInt8[np.ndarray, "b t h w 3"]:
        """The next chunk of everybody's sound -> frames; t = 0 while the first ones are in flight, as in `Session.step`.

        Raises:
          ValueError: another number of samples than `generator.chunk_samples` says.
        """
        config = self.generator.config
        counts = chunk_sample_counts(config, self.chunk * config.stream.chunk)
        if audio.shape != (self.rows, sum(counts)):
            raise ValueError(f"chunk {self.chunk} takes {self.rows} rows of {sum(counts)} samples, got {list(audio.shape)}")
        padded = np.zeros((self.rows, max_chunk_samples(config)), np.float32)
        padded[:, : audio.shape[1]] = audio
        inputs = StepInputs(jnp.asarray(padded), jnp.tile(jnp.asarray([counts], jnp.int32), (self.rows, 1)))
        begin = time.perf_counter()
        self._state, frames = self.generator.run_step(self._state, inputs)
        frames = np.asarray(frames)
        self.step_seconds.append(time.perf_counter() - begin)
        self.chunk += 1
        return frames if self.chunk > config.stream.delay else frames[:, :0]

    def swap_references(self, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> None:
        """From the next chunk on the streams show the people of these pictures."""
        self._state = install_reference(self._state, _rows([self.generator.encode_reference(image).keys_values for image in images]))

    def swap_prompts(self, prompts: Sequence[str]) -> None:
        """From the next chunk on the streams follow these prompts."""
        encoded = [self.generator.encode_prompt(prompt) for prompt in prompts]
        valid: Array = jnp.concatenate([count for _, count in encoded])
        self._state = install_prompt(self._state, _rows([keys_values for keys_values, _ in encoded]), valid)


def read_rows(estimator: Estimator, frames: UInt8[np.ndarray, "b t h w 3"]) -> list[Reading]:
    """The reading of every row's frames; all are read together, because the estimator takes many pictures at a time."""
    b, t = frames.shape[:2]
    together = estimator(frames.reshape(b * t, *frames.shape[2:]))
    return [jax.tree.map(lambda leaf, row=row: leaf[row * t : (row + 1) * t], together) for row in range(b)]


def _rows(parts: Sequence[KeysValues]) -> KeysValues:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)


def audio_of_chunk(generator: Generator, audio: Float[np.ndarray, "b n"], index: int) -> Float[np.ndarray, "b m"]:
    """The sound of one chunk out of whole tracks."""
    begin = sum(generator.chunk_samples(i) for i in range(index))
    return audio[:, begin : begin + generator.chunk_samples(index)]
