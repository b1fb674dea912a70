"""The generator's step: one program for ever, rows that know nothing of each other, and the state's rules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.audio.slices import chunk_sample_counts, chunk_slices, max_chunk_samples
from pikastream_jax.dit.model import KeysValues
from pikastream_jax.streaming.state import StepInputs, init_state, install_prompt, install_reference
from pikastream_jax.streaming.step import generate_clip, generate_step, slot_times, write_chunk
from tests.small import small_config, small_models

CHUNKS, BATCH = 6, 2


@functools.cache
def compiled_step(config):
    """(state, inputs) -> (state, frames), compiled once for all tests of a preset; the state is donated."""
    models, params = small_models(config)
    step = jax.jit(functools.partial(generate_step, models), donate_argnums=1)
    return step, functools.partial(step, params)


@functools.cache
def compiled_start(config):
    models, params = small_models(config)

    @jax.jit
    def installed(params, reference, tokens, valid):
        denoiser = models.denoiser.bind(params)
        state = install_reference(init_state(config, BATCH), denoiser.dit.reference_keys_values(reference))
        state = install_prompt(state, *denoiser.text_conditions(tokens, valid))
        return dataclasses.replace(state, rng=jnp.arange(2 * BATCH, dtype=jnp.uint32).reshape(BATCH, 2))

    return functools.partial(installed, params.denoiser)


def start(config):
    """Two rows with a face and a prompt each."""
    reference = np.random.default_rng(0).normal(size=(BATCH, *config.latent_grid, 4)).astype(np.float32)
    tokens = np.array([[[1, 5, 9, 0, 0, 0]]] * BATCH, np.int32)
    return compiled_start(config)(reference, tokens, np.full((BATCH, 1), 3, np.int32))


def inputs(config, chunk):
    counts = chunk_sample_counts(config, chunk * config.stream.chunk)
    audio = np.random.default_rng(100 + chunk).normal(size=(BATCH, max_chunk_samples(config))).astype(np.float32)
    return StepInputs(jnp.asarray(audio), jnp.tile(jnp.array([counts], jnp.int32), (BATCH, 1)))


@pytest.mark.parametrize("stream", [{}, {"sink": 2}, {"clean_pass": True, "fps": 24}])
def test_one_compilation_over_first_filling_and_full_cache(stream):
    config = small_config(**stream)
    step, run = compiled_step(config)
    state = start(config)
    shapes = jax.tree.map(jnp.shape, state)
    frames = []
    for chunk in range(CHUNKS):
        old = state
        state, video = run(state, inputs(config, chunk))
        assert old.dit_k.is_deleted(), "the state is donated"
        frames.append(video)
    assert step._cache_size() == 1
    assert jax.tree.map(jnp.shape, state) == shapes
    video = np.concatenate(frames, axis=1)
    assert video.shape == (2, CHUNKS * 8, 48, 32, 3) and video.dtype == np.uint8
    assert video.std() > 0.1 * 127
    assert state.ring_count.tolist() == [CHUNKS * 2 - config.stream.sink] * 2


def test_the_offline_form_equals_the_stream():
    config = small_config()
    models, params = small_models(config)
    given = [inputs(config, chunk) for chunk in range(CHUNKS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)
    end, clip = jax.jit(functools.partial(generate_clip, models))(params, start(config), stacked)
    state, frames = start(config), []
    for one in given:
        state, video = compiled_step(config)[1](state, one)
        frames.append(video)
    assert np.abs(clip.astype(int) - np.concatenate(frames, axis=1).astype(int)).max() <= 1
    np.testing.assert_allclose(end.dit_k, state.dit_k, atol=1e-3)


def test_rows_are_independent():
    """A row gives the same frames whatever its neighbour does."""
    config = small_config()
    _, run = compiled_step(config)
    state = start(config)
    other = start(config)
    other = dataclasses.replace(other, rng=other.rng.at[1].set(jnp.array([7, 7], jnp.uint32)))
    for chunk in range(3):
        now = inputs(config, chunk)
        changed = dataclasses.replace(now, audio=now.audio.at[1].set(0.0))
        state, video = run(state, now)
        other, video_other = run(other, changed)
        np.testing.assert_array_equal(video[0], video_other[0])
        assert (video[1] != video_other[1]).any()


def test_no_later_sound_reaches_a_chunk():
    config = small_config()
    _, run = compiled_step(config)
    first = inputs(config, 0)
    used = int(first.samples[0].sum())
    later = dataclasses.replace(first, audio=first.audio.at[:, used:].set(9.0))
    _, expected = run(start(config), first)
    np.testing.assert_array_equal(run(start(config), later)[1], expected)
    sooner = dataclasses.replace(first, audio=first.audio.at[:, used - 200 : used].set(0.0))
    assert (run(start(config), sooner)[1] != expected).any(axis=(1, 2, 3, 4)).all()


def test_slot_times_by_hand():
    config = small_config(sink=2)  # chunk 2, window 4: the chunk stands at -1 and 0
    times = slot_times(config, jnp.array([0, 2, 6]))
    assert times[:, 0].tolist() == [8.0] * 3, "reference_distance after the chunk's last latent frame"
    assert times[:, 1:3].tolist() == [[-7.0, -6.0]] * 3, "the sink right before the window"
    # Ring slots hold latent frames 0-3; after 6 writes slots 0, 1 hold frames 4, 5 and slots 2, 3 frames 2, 3.
    assert times[2, 3:].tolist() == [-3.0, -2.0, -5.0, -4.0]
    assert times[1, 3:5].tolist() == [-3.0, -2.0]


def test_the_sink_fills_first_and_empties_on_a_new_reference():
    config = small_config(sink=2)
    n = config.tokens_per_frame
    state = init_state(config, 2)
    state = dataclasses.replace(state, sink_count=jnp.array([0, 2]))

    def chunk(value):
        shape = (config.dit.blocks, 2, 2 * n, config.dit.heads, config.dit.head_dim)
        return KeysValues(jnp.full(shape, value), jnp.full(shape, value))

    state = write_chunk(config, state, chunk(1.0))
    state = write_chunk(config, state, chunk(2.0))
    by_frame = state.dit_k[0, :, ::n, 0, 0]
    assert by_frame[0].tolist() == [0, 1, 1, 2, 2, 0, 0], "row 0: reference, sink, ring"
    assert by_frame[1].tolist() == [0, 0, 0, 1, 1, 2, 2], "row 1 had its sink already"
    assert state.sink_count.tolist() == [2, 2] and state.ring_count.tolist() == [2, 4]
    reference = KeysValues(*(jnp.full((config.dit.blocks, 2, n, config.dit.heads, config.dit.head_dim), 5.0),) * 2)
    state = install_reference(state, reference)
    assert state.sink_count.tolist() == [0, 0]
    assert state.dit_v[0, 0, ::n, 0, 0].tolist() == [5, 1, 1, 2, 2, 0, 0]


def test_what_was_in_flight_before_the_first_sound_is_not_kept_in_the_sink():
    config = small_config(sink=2, schedule="rolling", steps=3)
    n = config.tokens_per_frame
    state = dataclasses.replace(init_state(config, 2), chunk_count=jnp.array([1, 2]))  # the first real chunk leaves with chunk 2
    shape = (config.dit.blocks, 2, 2 * n, config.dit.heads, config.dit.head_dim)
    state = write_chunk(config, state, KeysValues(jnp.ones(shape), jnp.ones(shape)))
    assert state.sink_count.tolist() == [0, 2] and state.ring_count.tolist() == [2, 0]
    assert state.dit_k[0, :, ::n, 0, 0].tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("fps", [24, 25, 30])
def test_slices_of_a_stream_equal_slices_of_the_whole(fps):
    """The rational clock: 24 FPS has 2,666.67 samples to a latent frame, and nothing drifts."""
    config = small_config(fps=fps)
    length = config.audio.context_samples
    total = config.latent_end_sample(39)
    sound = np.random.default_rng(0).normal(size=total).astype(np.float32)
    context = jnp.zeros((1, length))
    cut = jax.jit(lambda c, a, s: chunk_slices(c, a, s, length))
    position, slices = 0, []
    for chunk in range(20):
        counts = chunk_sample_counts(config, 2 * chunk)
        audio = np.zeros(max_chunk_samples(config), np.float32)
        audio[: sum(counts)] = sound[position : position + sum(counts)]
        position += sum(counts)
        context, one = cut(context, audio[None], jnp.array([counts]))
        slices += list(np.asarray(one[0]))
    assert position == total == round(160 / fps * 16_000)
    padded = np.concatenate([np.zeros(length, np.float32), sound])
    for n, one in enumerate(slices):
        end = length + round(4 * (n + 1) * 16_000 / fps)
        np.testing.assert_array_equal(one, padded[end - length : end])
