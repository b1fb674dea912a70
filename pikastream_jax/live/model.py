"""What the live engine asks of a model, and the streaming generator as such a model."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from pikastream_jax.streaming.generator import Generator
from pikastream_jax.streaming.rows import RowStepper
from pikastream_jax.streaming.state import install_prompt, install_reference

State = Any
Change = Callable[[State], State]

# The rest is for steps that take longer than those so far. On a CPU one more session slows all steps down, since encoders take the same cores: of two
# that were admitted at 0.85 on two cores one had 4% of its frames late.
LOAD, LOAD_ON_CPU = 0.85, 0.7


@runtime_checkable
class LiveModel(Protocol):
    """A model whose streams are states that a step takes and gives back."""

    fps: int
    height: int  # pixels
    width: int
    sample_rate: int  # Hz
    chunk_frames: int
    rows: int  # streams of one step
    load: float  # share of the time that steps of several sessions may take

    def chunk_samples(self, index: int) -> int:
        """Samples of chunk `index`."""

    def start(self, image: UInt8[np.ndarray, "h w 3"], prompt: str, seed: int) -> State:
        """A stream before its first sound."""

    def prompt_change(self, prompt: str) -> Change:
        """Does the work for another prompt; what is returned only puts it into a state."""

    def reference_change(self, image: UInt8[np.ndarray, "h w 3"]) -> Change:
        """The same for another face."""

    def step(self, streams: Sequence[tuple[State, int, Float32[np.ndarray, " n"]]]) -> tuple[list[State], UInt8[np.ndarray, "b t h w 3"]]:
        """One chunk of every stream; waits for its frames."""


class StreamModel:
    """The streaming generator as a `LiveModel`.

    Args:
      rows: streams of one step: more on a device that has room for them, 1 on a CPU, where together takes as long as one after another.

    Raises:
      ValueError: a generator in the rolling schedule, whose frames leave several chunks late.
    """

    def __init__(self, generator: Generator, rows: int = 1):
        if delay := generator.config.stream.delay:
            raise ValueError(f"a rolling stream shows its frames {delay} chunks late: give the live service a sequential one")
        self._generator, self._stepper = generator, RowStepper(generator, rows)
        self.fps, self.sample_rate, self.chunk_frames, self.rows = generator.fps, generator.sample_rate, generator.chunk_frames, rows
        self.height, self.width, self.load = generator.height, generator.width, LOAD_ON_CPU if jax.default_backend() == "cpu" else LOAD
        self.chunk_samples = generator.chunk_samples
        self._install_prompt = jax.jit(install_prompt, donate_argnums=0)
        self._install_reference = jax.jit(install_reference, donate_argnums=0)

    def start(self, image: UInt8[np.ndarray, "h w 3"], prompt: str, seed: int) -> State:
        return self._generator.start(self._generator.encode_reference(image), self._generator.encode_prompt(prompt), seed)

    def prompt_change(self, prompt: str) -> Change:
        encoded = jax.block_until_ready(self._generator.encode_prompt(prompt))
        return lambda state: self._install_prompt(state, *encoded)

    def reference_change(self, image: UInt8[np.ndarray, "h w 3"]) -> Change:
        reference = jax.block_until_ready(self._generator.encode_reference(image))
        return lambda state: self._install_reference(state, reference.keys_values)

    def step(self, streams: Sequence[tuple[State, int, Float32[np.ndarray, " n"]]]) -> tuple[list[State], UInt8[np.ndarray, "b t h w 3"]]:
        states, frames = self._stepper.step(streams)
        return states, np.asarray(frames)

    def compiled_steps(self) -> int:
        """How often the step was compiled; 1 for ever once warm."""
        return self._stepper.compiled_steps()
