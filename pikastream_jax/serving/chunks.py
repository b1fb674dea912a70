"""Sound cut into the generator's chunks, in two copies on one clock: what the model hears and what the viewer hears."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float32

from pikastream_jax.serving.audio_in import AudioSource, checked_blocks
from pikastream_jax.serving.resample import StreamResampler

MASTER_RATE = 48_000  # Hz of the sound that is sent


@dataclasses.dataclass(frozen=True)
class AudioChunk:
    """The sound of one chunk of video."""

    index: int
    speech: Float32[np.ndarray, " n"]  # mono at the model's rate, padded with silence in the last chunk
    master: Float32[np.ndarray, "m channels"]  # the same stretch at MASTER_RATE, 1 or 2 channels, not padded
    last: bool  # the sound ends inside this chunk
    ready_at: float  # time.perf_counter() when its last sample was there


def output_channels(source: AudioSource) -> int:
    """Mono stays mono, stereo stereo; anything wider is mixed to mono."""
    return source.channels if source.channels <= 2 else 1


def audio_chunks(source: AudioSource, chunk_samples: Callable[[int], int], model_rate: int) -> Iterator[AudioChunk]:
    """Cuts `source` into chunks, each as soon as its sound has arrived.

    Args:
      source: any rate, any number of channels.
      chunk_samples: samples of chunk i at `model_rate`.
      model_rate: Hz.
    """
    to_model = StreamResampler(source.rate, model_rate, 1)
    to_master = StreamResampler(source.rate, MASTER_RATE, output_channels(source))
    speech = np.zeros((0, 1), np.float32)
    master = np.zeros((0, output_channels(source)), np.float32)
    index = 0
    speech_end = chunk_samples(0)  # where the current chunk ends, counted from the start of the sound
    master_start, master_end = 0, _rescale(speech_end, model_rate)

    for block in checked_blocks(source):
        mono = block.mean(axis=1, keepdims=True)
        speech = np.concatenate([speech, to_model.push(mono)])
        master = np.concatenate([master, to_master.push(block if block.shape[1] <= 2 else mono)])
        while len(speech) >= chunk_samples(index) and len(master) >= master_end - master_start:
            size, master_size = chunk_samples(index), master_end - master_start
            yield AudioChunk(index, speech[:size, 0], master[:master_size], False, time.perf_counter())
            speech, master = speech[size:], master[master_size:]
            index += 1
            speech_end += chunk_samples(index)
            master_start, master_end = master_end, _rescale(speech_end, model_rate)

    speech = np.concatenate([speech, to_model.finish()])
    master = np.concatenate([master, to_master.finish()])
    while len(master):  # what the resamplers still held may complete one chunk and begin another
        size, master_size = chunk_samples(index), master_end - master_start
        padded = np.pad(speech[:size, 0], (0, size - len(speech[:size])))
        yield AudioChunk(index, padded, master[:master_size], len(master) <= master_size, time.perf_counter())
        speech, master = speech[size:], master[master_size:]
        index += 1
        speech_end += chunk_samples(index)
        master_start, master_end = master_end, _rescale(speech_end, model_rate)


def _rescale(samples: int, rate: int) -> int:
    return (samples * MASTER_RATE * 2 + rate) // (2 * rate)
