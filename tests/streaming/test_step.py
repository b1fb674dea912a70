"""The generator's step: one program for ever, rows that know nothing of each other, and the state's rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.audio.slices import chunk_sample_counts, chunk_slices, max_chunk_samples
from pikastream_jax.dit.model import KeysValues
from pikastream_jax.streaming.state import StepInputs, init_state, install_prompt, install_reference
from pikastream_jax.streaming.step import generate_clip, generate_step, slot_times, write_chunk
from tests.small import small_config, small_models

CHUNKS = 6


def start(config, models, params, batch, seed=0):
    denoiser = models.denoiser.bind(params.denoiser)
    rows, columns = config.latent_grid
    reference = jax.random.normal(jax.random.key(seed), (batch, rows, columns, 4))
    state = install_reference(init_state(config, batch), denoiser.dit.reference_keys_values(reference))
    tokens = jnp.tile(jnp.array([[[1, 5, 9, 0, 0, 0]]]), (batch, 1, 1))
    state = install_prompt(state, *denoiser.text_conditions(tokens, jnp.full((batch, 1), 3)))
    return dataclasses.replace(state, rng=jnp.arange(2 * batch, dtype=jnp.uint32).reshape(batch, 2) + seed)


def inputs(config, chunk, batch):
    counts = chunk_sample_counts(config, chunk * config.stream.chunk)
    audio = jax.random.normal(jax.random.key(100 + chunk), (batch, max_chunk_samples(config)))
    return StepInputs(audio, jnp.tile(jnp.array([counts], jnp.int32), (batch, 1)))


@pytest.mark.parametrize("stream", [{}, {"sink": 2}, {"clean_pass": True, "fps": 24}])
def test_one_compilation_over_first_filling_and_full_cache(stream):
    config = small_config(**stream)
    models, params = small_models(config)
    step = jax.jit(lambda p, s, i: generate_step(models, p, s, i), donate_argnums=1)
    state = start(config, models, params, 2)
    shapes = jax.tree.map(jnp.shape, state)
    frames = []
    for chunk in range(CHUNKS):
        old = state
        state, video = step(params, state, inputs(config, chunk, 2))
        assert old.dit_k.is_deleted(), "the state is donated"
        frames.append(video)
    assert step._cache_size() == 1
    assert jax.tree.map(jnp.shape, state) == shapes
    video = np.concatenate(frames, axis=1)
    assert video.shape == (2, CHUNKS * 8, 48, 32, 3) and video.dtype == np.uint8
    assert video.std() > 0.1 * 127
    assert state.ring_count.tolist() == [CHUNKS * 2 - config.stream.sink] * 2

    # The offline form is a scan of the same step.
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[inputs(config, chunk, 2) for chunk in range(CHUNKS)])
    _, clip = jax.jit(lambda p, s, i: generate_clip(models, p, s, i))(params, start(config, models, params, 2), stacked)
    assert np.abs(clip.astype(int) - video.astype(int)).max() <= 1


def test_rows_are_independent():
    """A row gives the same frames whatever its neighbour does."""
    config = small_config()
    models, params = small_models(config)
    step = jax.jit(lambda p, s, i: generate_step(models, p, s, i))
    state = start(config, models, params, 2)
    other = jax.tree.map(lambda leaf: leaf, state)
    other = dataclasses.replace(other, rng=state.rng.at[1].set(jnp.array([7, 7], jnp.uint32)))
    for chunk in range(3):
        now = inputs(config, chunk, 2)
        changed = dataclasses.replace(now, audio=now.audio.at[1].set(0.0))
        state, video = step(params, state, now)
        other, video_other = step(params, other, changed)
        np.testing.assert_array_equal(video[0], video_other[0])
        assert (video[1] != video_other[1]).any()


def test_no_later_sound_reaches_a_chunk():
    config = small_config()
    models, params = small_models(config)
    step = jax.jit(lambda p, s, i: generate_step(models, p, s, i))
    first = inputs(config, 0, 1)
    used = int(first.samples.sum())
    later = dataclasses.replace(first, audio=first.audio.at[:, used:].set(9.0))
    state = start(config, models, params, 1)
    np.testing.assert_array_equal(step(params, state, first)[1], step(params, state, later)[1])
    sooner = dataclasses.replace(first, audio=first.audio.at[:, used - 200 : used].set(0.0))
    assert (step(params, state, first)[1] != step(params, state, sooner)[1]).any()


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
