"""Which samples a latent frame hears, look-ahead included: nothing later, and streaming as offline."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.audio.slices import chunk_sample_counts, chunk_slices, max_chunk_samples
from tests.small import small_config

CHUNKS = 6


def config_with(fps, look_ahead):
    config = small_config(fps=fps)
    return dataclasses.replace(config, audio=dataclasses.replace(config.audio, look_ahead=look_ahead))


def stream_slices(config, sound):
    """Every latent frame's slice, the sound arriving chunk by chunk: [latent frames, n]."""
    length = config.audio.context_samples
    cut = jax.jit(lambda context, audio, samples: chunk_slices(context, audio, samples, length))
    context, position, slices = jnp.zeros((1, length)), 0, []
    for chunk in range(CHUNKS):
        counts = chunk_sample_counts(config, chunk * config.stream.chunk)
        # What follows the chunk's own samples is ignored, so it may be anything.
        audio = np.full((1, max_chunk_samples(config)), np.nan, np.float32)
        audio[0, : sum(counts)] = sound[position : position + sum(counts)]
        position += sum(counts)
        context, one = cut(context, audio, jnp.array([counts]))
        slices += list(np.asarray(one[0]))
    return np.stack(slices)


@pytest.mark.parametrize(("fps", "look_ahead"), [(25, 0), (25, 400), (24, 1000), (30, 2000)])
def test_slices_end_look_ahead_samples_after_their_latent_frame(fps, look_ahead):
    config = config_with(fps, look_ahead)
    length = config.audio.context_samples
    sound = np.arange(1, 70_000, dtype=np.float32)  # sample s has the value s + 1
    for n, one in enumerate(stream_slices(config, sound)):
        end = round(4 * (n + 1) * 16_000 / fps) + look_ahead
        expected = np.maximum(np.arange(end - length, end) + 1, 0)  # silence before the stream's start
        np.testing.assert_array_equal(one, expected)


def test_counts_by_hand():
    """At 24 FPS a latent frame is 2,666 2/3 samples: 2667, 2666, 2667, ... and the look-ahead comes once, at the start."""
    config = config_with(24, 1000)
    counts = [count for chunk in range(3) for count in chunk_sample_counts(config, 2 * chunk)]
    assert counts == [3667, 2666, 2667, 2667, 2666, 2667]
    assert chunk_sample_counts(config_with(25, 0), 0) == [2560, 2560]


@pytest.mark.parametrize("look_ahead", [0, 1000])
@pytest.mark.parametrize("fps", [7, 24, 25, 30])
def test_no_chunk_of_an_hour_needs_more_than_the_buffer(fps, look_ahead):
    config = config_with(fps, look_ahead)
    hour = 3600 * fps // config.chunk_frames
    counts = [sum(chunk_sample_counts(config, 2 * chunk)) for chunk in range(hour)]
    assert max(counts) <= max_chunk_samples(config)
    assert sum(counts) == round(hour * config.chunk_frames * 16_000 / fps) + look_ahead
