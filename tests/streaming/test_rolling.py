"""The rolling schedule: chunks at rising noise levels move one level down in every pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pikastream_jax.config import StreamConfig
from pikastream_jax.diffusion.flow import interpolate, passes, solver_timesteps
from pikastream_jax.dit.model import Conditions, KeysValues
from pikastream_jax.nn.rope import grid_positions, rope_tables, rotate
from pikastream_jax.streaming.state import fill_buffer, init_state, install_prompt, install_reference
from pikastream_jax.streaming.step import denoise_chunk, generate_step, slot_times
from tests.small import small_config, small_models
from tests.streaming.test_step import inputs

CONFIG = small_config(schedule="rolling", steps=3)
CHUNK, BATCH = 2, 2


def test_levels_of_both_schedules_by_hand():
    times = solver_timesteps(3, 2.0).tolist()  # 1, 0.8, 0.5, 0
    before, after = passes(StreamConfig(chunk=2, steps=3, window=4, schedule="rolling"))
    assert before.tolist() == [[times[2]] * 2 + [times[1]] * 2 + [times[0]] * 2]
    assert after.tolist() == [[times[3]] * 2 + [times[2]] * 2 + [times[1]] * 2]
    before, after = passes(StreamConfig(chunk=2, steps=3, window=4))
    assert before.tolist() == [[t] * 2 for t in times[:-1]] and after.tolist() == [[t] * 2 for t in times[1:]]
    # Whichever way, a chunk meets the same timesteps in the same order.


@functools.cache
def begun():
    """Models and the state of two streams with a face and a prompt."""
    models, params = small_models(CONFIG)

    @jax.jit
    def start(params):
        denoiser = models.denoiser.bind(params.denoiser)
        reference = jax.random.normal(jax.random.key(0), (BATCH, *CONFIG.latent_grid, 4))
        tokens = jnp.array([[[1, 5, 9, 0, 0, 0]]] * BATCH)
        rng = jnp.arange(2 * BATCH, dtype=jnp.uint32).reshape(BATCH, 2)
        state = install_reference(init_state(CONFIG, BATCH), denoiser.dit.reference_keys_values(reference))
        state = install_prompt(dataclasses.replace(state, rng=rng), *denoiser.text_conditions(tokens, jnp.full((BATCH, 1), 3)))
        silence = denoiser.audio.from_samples(jnp.zeros(CONFIG.audio.context_samples))
        return fill_buffer(CONFIG, state, reference, silence), reference, silence

    return models, params, *start(params)


def test_the_buffer_begins_as_the_noisy_reference_in_silence():
    _, _, state, reference, silence = begun()
    waiting = 2 * CHUNK
    assert state.buffer.latents.shape[1] == state.buffer.audio.shape[1] == state.buffer.motion.shape[1] == waiting
    np.testing.assert_array_equal(state.buffer.audio[1, 3], silence)
    times = solver_timesteps(3, CONFIG.stream.shift)
    clean = (state.buffer.latents - interpolate(jnp.zeros_like(state.buffer.latents), noise(state), levels(times))) / (
        1 - levels(times)[..., None, None, None]
    )
    np.testing.assert_allclose(clean, jnp.broadcast_to(reference[:, None], clean.shape), atol=1e-4)


def levels(times):
    return jnp.tile(jnp.repeat(jnp.asarray(times[2:0:-1]), CHUNK), (BATCH, 1))


def noise(state):
    def draw(rng):
        return jax.random.normal(jax.random.fold_in(jax.random.wrap_key_data(rng), 2**32 - 1), state.buffer.latents.shape[1:])

    return jax.vmap(draw)(state.rng)


def test_one_pass_moves_every_chunk_one_level_down():
    """Against the network called by hand on the joined chunks, with each its own timestep."""
    models, params, state, _, _ = begun()
    dit = CONFIG.dit
    keys = jax.random.split(jax.random.key(3), 3)
    shape = (BATCH, 3 * CHUNK)
    audio = jax.random.normal(keys[0], (*shape, CONFIG.audio.tokens, CONFIG.audio.dim))
    motion, fresh = jax.random.normal(keys[1], (*shape, dit.motion)), jax.random.normal(keys[2], (BATCH, CHUNK, *CONFIG.latent_grid, 4))

    @jax.jit
    def both(params, state):
        module = models.denoiser.bind(params.denoiser).dit
        conditions = Conditions(state.text, state.text_valid, module.audio_keys_values(audio), motion)
        x = jnp.concatenate([state.buffer.latents, fresh], axis=1)
        t, t_next = (jnp.asarray(times) for times in passes(CONFIG.stream))
        places = grid_positions(slot_times(CONFIG, state.ring_count), *CONFIG.token_grid)
        cache = KeysValues(rotate(state.dit_k, rope_tables(*places, dit.head_dim)), state.dit_v)
        n = CONFIG.tokens_per_frame
        lengths = dict(fixed_slots=n, fixed_valid=jnp.full(BATCH, n), ring_valid=jnp.zeros(BATCH, jnp.int32))
        velocity, own = module.forward_chunk(x, jnp.tile(t, (BATCH, 1)), conditions, cache, **lengths, kept=3 * CHUNK)
        moved = x + (t_next - t)[0][None, :, None, None, None] * velocity
        return moved, own, denoise_chunk(models, params.denoiser, state, conditions, fresh)

    moved, own, (after, latents) = both(params, state)
    np.testing.assert_allclose(latents, moved[:, :CHUNK], atol=1e-5)
    np.testing.assert_allclose(after.buffer.latents, moved[:, CHUNK:], atol=1e-5)
    n = CONFIG.tokens_per_frame
    np.testing.assert_allclose(after.dit_k[:, :, n : n + CHUNK * n], own.k[:, :, : CHUNK * n], atol=1e-5)
    assert after.ring_count.tolist() == [CHUNK] * BATCH


def test_places_leave_room_for_all_chunks_in_flight():
    """Three chunks of two stand at -5 to 0, so the ring's newest frame is at -6."""
    times = slot_times(CONFIG, jnp.array([2]))
    assert times[0, 1:3].tolist() == [-7.0, -6.0] and times[0, 0] == CONFIG.stream.reference_distance


def test_a_stream_is_one_program_and_hears_its_sound_two_chunks_late():
    """Changing the sound of chunk 3 changes nothing before its frames, which come with the call for chunk 5, unless it is a
    neighbour in flight: frames of chunks 1 and 2 share passes with it and may change, chunk 0 may not."""
    models, params, state, _, _ = begun()
    step = jax.jit(functools.partial(generate_step, models))
    videos = {}
    for changed in (False, True):
        current, frames = state, []
        for chunk in range(6):
            now = inputs(CONFIG, chunk)
            if changed and chunk == 3:
                now = dataclasses.replace(now, audio=-now.audio[:, ::-1])
            current, video = step(params, current, now)
            frames.append(np.asarray(video))
        videos[changed] = frames
    assert step._cache_size() == 1
    different = [(a != b).any() for a, b in zip(videos[False], videos[True], strict=True)]
    assert different == [False] * 3 + [True] * 3
    assert np.std(videos[False]) > 0.1 * 127
