"""The audio encoder: a latent frame hears its own slice and nothing else, streamed or not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.audio.encoder import AudioEncoder
from pikastream_jax.audio.mel import log_mel
from pikastream_jax.audio.slices import chunk_sample_counts, chunk_slices, max_chunk_samples
from pikastream_jax.nn.layers import functional
from tests.small import randomised, small_config

CONFIG = small_config(fps=24)
CHUNKS = 4


@pytest.fixture(scope="module")
def encoder():
    model = functional(lambda rngs: AudioEncoder(CONFIG.audio, rngs=rngs))
    params = randomised(model.abstract, 0)
    encode = jax.jit(lambda slices: model.bind(params).from_samples(slices))
    from_mel = jax.jit(lambda mel: model.bind(params)(mel))
    return encode, from_mel


@pytest.fixture(scope="module")
def sound():
    rng = np.random.default_rng(0)
    time = np.arange(40_000) / 16_000
    return (0.3 * np.sin(2 * np.pi * (150 + 600 * time) * time) + 0.02 * rng.normal(size=time.size)).astype(np.float32)


def test_a_slice_alone_equals_the_slice_in_a_batch(encoder):
    encode, _ = encoder
    slices = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, CONFIG.audio.context_samples)) * 0.1, jnp.float32)
    together = np.asarray(encode(slices))
    assert together.shape == (2, 3, CONFIG.audio.tokens, CONFIG.audio.dim)
    assert together.std() > 0.1
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(encode(slices[index]), together[index], atol=1e-5)
    moved = np.abs(encode(slices.at[1, 2].add(0.1)) - together).max(axis=(2, 3))
    assert moved[1, 2] > 1e-3 and np.count_nonzero(moved) == 1


def test_samples_give_the_tokens_of_their_spectrum(encoder):
    encode, from_mel = encoder
    slices = jnp.asarray(np.random.default_rng(2).normal(size=(3, CONFIG.audio.context_samples)) * 0.1, jnp.float32)
    mel = log_mel(slices, CONFIG.audio)
    assert mel.shape == (3, CONFIG.audio.mel_frames, CONFIG.audio.mels)
    np.testing.assert_allclose(encode(slices), from_mel(mel), atol=1e-4)


def test_every_mel_frame_counts(encoder):
    """Each mel frame of a slice moves the tokens, and time is not symmetric: the order matters."""
    _, from_mel = encoder
    mel = jnp.asarray(np.random.default_rng(3).normal(size=(CONFIG.audio.mel_frames, CONFIG.audio.mels)), jnp.float32)
    before = from_mel(mel)
    for frame in range(CONFIG.audio.mel_frames):
        assert np.abs(from_mel(mel.at[frame].add(1.0)) - before).max() > 1e-3
    swapped = jnp.concatenate([mel[4:8], mel[:4], mel[8:]])
    exchanged = jnp.concatenate([before[1:2], before[:1], before[2:]])
    assert np.abs(from_mel(swapped) - exchanged).max() > 1e-3


def stream_tokens(config, encode, sound):
    """[latent frames, tokens, width], the sound arriving chunk by chunk."""
    length = config.audio.context_samples
    cut = jax.jit(lambda context, audio, samples: chunk_slices(context, audio, samples, length))
    context, position, tokens = jnp.zeros((1, length)), 0, []
    for chunk in range(CHUNKS):
        counts = chunk_sample_counts(config, chunk * config.stream.chunk)
        audio = np.zeros((1, max_chunk_samples(config)), np.float32)
        audio[0, : sum(counts)] = sound[position : position + sum(counts)]
        position += sum(counts)
        context, slices = cut(context, audio, jnp.array([counts]))
        tokens.append(np.asarray(encode(slices[0])))
    return np.concatenate(tokens)


@pytest.mark.parametrize("look_ahead", [0, 700])
def test_streaming_equals_offline_and_the_future_changes_nothing(encoder, sound, look_ahead):
    encode, _ = encoder
    config = dataclasses.replace(CONFIG, audio=dataclasses.replace(CONFIG.audio, look_ahead=look_ahead))
    length = config.audio.context_samples
    frames = CHUNKS * config.stream.chunk
    ends = [round(4 * (n + 1) * 16_000 / 24) + look_ahead for n in range(frames)]

    streamed = stream_tokens(config, encode, sound)
    padded = np.concatenate([np.zeros(length, np.float32), sound])
    offline = encode(jnp.stack([padded[end : end + length] for end in ends]))
    assert streamed.std() > 0.1
    np.testing.assert_allclose(streamed, offline, atol=1e-4)

    # Everything from the end of latent frame 4's hearing on is replaced: frames 0-4 stay bit for bit, 5 moves.
    changed = sound.copy()
    changed[ends[4] :] = 0.5
    difference = np.abs(stream_tokens(config, encode, changed) - streamed).max(axis=(1, 2))
    assert (difference[:5] == 0).all()
    assert (difference[5:] > 1e-3).all()
    # And the very last millisecond before that end is heard.
    changed = sound.copy()
    changed[ends[4] - 16 * 5 : ends[4]] += 0.5
    assert np.abs(stream_tokens(config, encode, changed) - streamed).max(axis=(1, 2))[4] > 1e-3
