"""Chunks of several streams in one step, by one compiled program: what a device makes faster together than one after another.

Every stream keeps a state of its own, of one row. A step joins as many as the program has rows, pads with idle ones, and takes them apart
again, all inside one `jit` whose states are donated. A row's result does not depend on what stands in the others.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from pikastream_jax.audio.slices import chunk_sample_counts, max_chunk_samples
from pikastream_jax.streaming.compiling import stream_options
from pikastream_jax.streaming.generator import Generator
from pikastream_jax.streaming.state import StepInputs, StreamState, init_state, join_rows, split_rows
from pikastream_jax.streaming.step import ModelParams, generate_step


class RowStepper:
    """Steps up to `rows` streams of one generator together.

    Args:
      rows: of the program, at least 1; fewer streams cost as much.
    """

    def __init__(self, generator: Generator, rows: int = 1):
        if rows < 1:
            raise ValueError(f"a step of {rows} rows holds no stream: use at least 1")
        self.rows, self._generator = rows, generator
        models = generator.models

        def step(params: ModelParams, states: tuple[StreamState, ...], inputs: StepInputs):
            state, frames = generate_step(models, params, join_rows(states), inputs)
            return split_rows(state), frames

        self._step = jax.jit(step, donate_argnums=1, compiler_options=stream_options())
        self._idle = [init_state(generator.config, 1) for _ in range(rows)]

    def step(
        self, streams: Sequence[tuple[StreamState, int, Float32[np.ndarray, " n"]]]
    ) -> tuple[list[StreamState], UInt8[Array, "b t h w 3"]]:
        """One chunk of every stream.

        Args:
          streams: (state, which is donated; number of its chunk; that chunk's sound), at most `rows`.

        Returns:
          The states after it, and the frames of the same streams, still on the device.

        Raises:
          ValueError: no stream or too many, or sound of the wrong length.
        """
        config, n = self._generator.config, len(streams)
        if not 1 <= n <= self.rows:
            raise ValueError(f"{n} streams do not fit a step of {self.rows} rows: give 1 to {self.rows}")
        audio = np.zeros((self.rows, max_chunk_samples(config)), np.float32)
        samples = np.tile(np.asarray(chunk_sample_counts(config, 0), np.int32), (self.rows, 1))
        for row, (_, chunk, sound) in enumerate(streams):
            samples[row] = chunk_sample_counts(config, chunk * config.stream.chunk)
            if len(sound) != samples[row].sum():
                raise ValueError(f"chunk {chunk} takes {samples[row].sum()} samples, got {len(sound)}")
            audio[row, : len(sound)] = sound
        states = (*(state for state, _, _ in streams), *self._idle[n:])
        states, frames = self._step(self._generator.params, states, StepInputs(jnp.asarray(audio), jnp.asarray(samples)))
        self._idle[n:] = states[n:]
        return list(states[:n]), frames[:n]

    def compiled_steps(self) -> int:
        """How often the step was compiled; 1 for ever once warm."""
        return self._step._cache_size()
