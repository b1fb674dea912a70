"""Training for the rolling schedule sees what the engine's rolling mode sees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.config import StreamConfig
from pikastream_jax.diffusion.flow import interpolate, passes
from pikastream_jax.measuring.estimator import READERS
from pikastream_jax.streaming.state import init_state, install_reference
from pikastream_jax.streaming.step import denoise_chunk, write_chunk
from pikastream_jax.training.dit_data import DiTBatch
from pikastream_jax.training.latent_reader import Said
from pikastream_jax.training.rolling import (
    chunk_sizes,
    partition_levels,
    pass_count,
    random_sizes,
    remember,
    rolling_losses,
    rolling_passes,
)
from tests.small import small_config, small_models

CONFIG = small_config(schedule="rolling", steps=2)  # chunks of 2, 4 latent frames in flight, window 4
BATCH, FRAMES = 2, 8
READINGS = sum(reader.outputs for reader in READERS.values())


def batch_of(config=CONFIG, frames=FRAMES) -> DiTBatch:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return DiTBatch(
        latents=normal(BATCH, frames, 6, 4, 4),
        reference=normal(BATCH, 6, 4, 4),
        other_reference=normal(BATCH, 6, 4, 4),
        mel=normal(BATCH, frames, config.audio.mel_frames, config.audio.mels),
        tokens=jnp.asarray(rng.integers(2, 60, (BATCH, 2, config.text.length))),
        valid=jnp.full((BATCH, 2), 4),
        frame_prompt=jnp.tile(jnp.arange(frames) // 5, (BATCH, 1)),
        keep_audio=jnp.ones(BATCH, bool),
        weight=jnp.asarray(rng.uniform(0.5, 2.0, (BATCH, frames, 6, 4)), jnp.float32),
        boxes=jnp.zeros((BATCH, frames, 2, 4)),
        truth=normal(BATCH, frames, 5),
        opening=jnp.asarray(rng.uniform(0.0, 0.2, (BATCH, frames, 4)), jnp.float32),
        motion=normal(BATCH, frames, config.dit.motion),
    )


def test_partitions_by_hand():
    stream = StreamConfig(chunk=3, window=6, steps=4, shift=2.0, schedule="rolling")
    assert chunk_sizes(stream) == [1, 2, 3] and chunk_sizes(dataclasses.replace(stream, chunk=2, steps=5)) == [1, 2]
    levels = np.asarray(partition_levels(stream, jnp.array([3, 2, 1])))
    np.testing.assert_array_equal(levels[0], passes(stream)[0][0])
    np.testing.assert_allclose(levels[1], np.repeat([2 / 7, 1 / 2, 2 / 3, 4 / 5, 10 / 11, 1], 2), rtol=1e-6)  # 2 u / (1 + u), u = i / 6
    u = np.arange(1, 13) / 12
    np.testing.assert_allclose(levels[2], 2 * u / (1 + u), rtol=1e-6)
    sizes = np.asarray(random_sizes(jax.random.key(0), stream, 6000))
    np.testing.assert_allclose([(sizes == size).mean() for size in (1, 2, 3)], [1 / 9, 1 / 9, 7 / 9], atol=0.02)


def test_how_far_a_sequence_goes():
    """At least until the last pass has a whole window of 4 behind the 4 in flight."""
    assert [pass_count(CONFIG.stream, frames) for frames in (8, 9, 10)] == [3, 3, 4]
    with pytest.raises(ValueError, match="sequences of 7 latent frames are shorter than the 4 in flight .* use --latent-frames 8 or more"):
        pass_count(CONFIG.stream, 7)


def test_every_row_remembers_its_own_chunk():
    """Slots by hand, around the ring's end; and the engine's own way of writing where all chunks are the stream's."""
    n, stream = CONFIG.tokens_per_frame, CONFIG.stream
    state = dataclasses.replace(init_state(CONFIG, 3), ring_count=jnp.array([2, 3, 0]))
    rng = np.random.default_rng(0)
    shape = (CONFIG.dit.blocks, 3, stream.chunk * n, CONFIG.dit.heads, CONFIG.dit.head_dim)
    own = jax.tree.map(lambda kv: jnp.asarray(rng.normal(size=shape), jnp.float32), type(state.text)(0, 0))
    after = remember(CONFIG, state, own, jnp.array([2, 1, 1]))
    assert after.ring_count.tolist() == [4, 4, 1]
    for old, new, chunk in ((state.dit_k, after.dit_k, own.k), (state.dit_v, after.dit_v, own.v)):
        expected = np.array(old)
        for row, slots in enumerate(((2, 3), (3,), (0,))):
            for frame, slot in enumerate(slots):
                expected[:, row, (1 + slot) * n : (2 + slot) * n] = chunk[:, row, frame * n : (frame + 1) * n]
        np.testing.assert_array_equal(new, expected)
    even = dataclasses.replace(state, ring_count=jnp.array([2, 0, 4]), chunk_count=jnp.full(3, 9))
    ours, engines = remember(CONFIG, even, own, jnp.full(3, 2)), write_chunk(CONFIG, even, own)
    jax.tree.map(np.testing.assert_array_equal, ours, engines)


def test_a_pass_is_the_engines():
    """Three passes over a sequence against `denoise_chunk` in rolling mode, its buffer holding the same noisy clips: latents that leave, those that
    stay, and, by the second and third pass, what it remembers."""
    models, params = small_models(CONFIG)
    batch = dataclasses.replace(batch_of(), frame_prompt=jnp.zeros((BATCH, FRAMES), jnp.int32))
    noise = jax.random.normal(jax.random.key(1), batch.latents.shape)
    chunk, window = CONFIG.stream.chunk, CONFIG.stream.in_flight
    before, after = (jnp.broadcast_to(jnp.asarray(t), (BATCH, window)) for t in passes(CONFIG.stream))

    @jax.jit
    def trained(params):
        size = jnp.full(BATCH, chunk)
        return rolling_passes(models, params, batch, noise, size, lambda shown, velocity: velocity)

    @jax.jit
    def engine(params):
        denoiser = models.denoiser.bind(params)
        state = install_reference(init_state(CONFIG, BATCH), denoiser.dit.reference_keys_values(batch.reference))
        text, valid = denoiser.text_conditions(batch.tokens[:, :1], batch.valid[:, :1])
        moved = []
        for number in range(3):
            now = slice(number * chunk, number * chunk + window)
            x = interpolate(batch.latents[:, now], noise[:, now], before)
            state = dataclasses.replace(state, buffer=dataclasses.replace(state.buffer, latents=x[:, :-chunk]))
            conditions = denoiser.conditions(text, valid, batch.mel[:, now], batch.motion[:, now])
            state, latents = denoise_chunk(models, params, state, conditions, x[:, -chunk:])
            moved.append((jnp.concatenate([latents, state.buffer.latents], axis=1) - x) / (after - before)[..., None, None, None])
        return jnp.stack(moved)

    ours, engines = trained(params.denoiser), engine(params.denoiser)
    assert ours.shape == (3, BATCH, window, 6, 4, 4) and np.std(ours) > 0.1
    np.testing.assert_allclose(ours, engines, atol=2e-4)


def test_losses_by_hand():
    """Rows of other chunk sizes, a reader that reads the mean; against the passes' velocities in NumPy."""
    models, params = small_models(CONFIG)
    batch, size, key = batch_of(), jnp.array([2, 1]), jax.random.key(3)

    def reader(latents, boxes, truth):
        mean = latents.mean(axis=(2, 3, 4))[..., None]
        return Said(jnp.broadcast_to(mean, (*latents.shape[:2], READINGS)), jnp.broadcast_to(mean, (*latents.shape[:2], 4)))

    noise = jax.random.normal(key, batch.latents.shape)
    run = jax.jit(functools.partial(rolling_passes, models, judge=lambda shown, velocity: (shown, velocity)))
    shown, velocity = run(params.denoiser, batch, noise, size)
    parts = jax.jit(lambda params: rolling_losses(models, params, batch, key, size, reader))(params.denoiser)
    losses, misread, closures = [], [], []
    for number in range(3):
        for row in range(BATCH):
            now = slice(number * int(size[row]), number * int(size[row]) + 4)
            clean, eps = np.asarray(batch.latents[row, now]), np.asarray(noise[row, now])
            np.testing.assert_array_equal(shown.rows.latents[number, row], clean)
            np.testing.assert_array_equal(shown.rows.frame_prompt[number, row], batch.frame_prompt[row, now])
            error = np.asarray(velocity[number, row]) - (eps - clean)
            losses.append((np.asarray(batch.weight[row, now]) * (error**2).mean(-1)).mean())
            t = np.asarray(shown.t[number, row])
            misread.append(((t * error.mean(axis=(1, 2, 3))) ** 2).mean())
            logit = (clean - t[:, None, None, None] * error).mean(axis=(1, 2, 3))[:, None]
            sign = np.where(np.asarray(batch.opening[row, now]) < 0.1, -1, 1)
            closures.append(np.log(1 + np.exp(sign * logit)).mean())
    assert parts["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert parts["identity"] == pytest.approx(np.mean(misread), rel=1e-3) == parts["expression"]
    assert parts["closures"] == pytest.approx(np.mean(closures), rel=1e-3)


def test_gradient_reaches_the_weights_but_not_through_the_cache():
    """A loss on the last pass alone moves the reference's part of the network, and is deaf to what the first pass was shown but for its keys."""
    models, params = small_models(CONFIG)
    batch = batch_of()
    noise = jax.random.normal(jax.random.key(1), batch.latents.shape)

    @jax.jit
    def gradient(params, reference, noise):
        def last(reference, noise):
            given = dataclasses.replace(batch, reference=reference)
            return jnp.sum(rolling_passes(models, params, given, noise, jnp.full(BATCH, 2), lambda shown, velocity: velocity)[2] ** 2)

        return jax.grad(last, argnums=(0, 1))(reference, noise)

    of_reference, of_noise = gradient(params.denoiser, batch.reference, noise)
    assert np.abs(of_reference).max() > 1e-3
    assert (np.asarray(of_noise[:, :4]) == 0).all() and np.abs(of_noise[:, 4:]).max() > 1e-3
