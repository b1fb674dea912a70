"""The DiT: the chunked pass through the cache against the whole sequence, and what each token may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.dit.model import KeysValues, timestep_embedding
from pikastream_jax.nn.rope import grid_positions, rope_tables, rotate
from pikastream_jax.streaming.state import init_state, install_reference
from pikastream_jax.streaming.step import slot_times, write_chunk
from tests.small import small_config, small_models

FRAMES = 10


@pytest.fixture(scope="module")
def setting():
    config = small_config()
    models, params = small_models(config)
    rows, columns = config.latent_grid
    keys = jax.random.split(jax.random.key(5), 6)
    inputs = dict(
        latents=jax.random.normal(keys[0], (2, FRAMES, rows, columns, 4)),
        reference=jax.random.normal(keys[1], (2, rows, columns, 4)),
        mel=jax.random.normal(keys[2], (2, FRAMES, config.audio.mel_frames, config.audio.mels)),
        tokens=jax.random.randint(keys[3], (2, 1, config.text.length), 0, 60),
        valid=jnp.array([[3], [6]]),
        t=jnp.repeat(jax.random.uniform(keys[4], (2, FRAMES // 2)), 2, axis=1),
        motion=jax.random.normal(keys[5], (2, FRAMES, config.dit.motion)),
    )
    return config, models, params.denoiser, inputs


@functools.cache
def compiled_sequence(config):
    """One program for all tests: chunks and distance are data."""
    models, _ = small_models(config)

    @jax.jit
    def run(params, inputs, chunk_ids, distance):
        denoiser = models.denoiser.bind(params)
        text, valid = denoiser.text_conditions(inputs["tokens"], inputs["valid"])
        return denoiser.dit.forward_sequence(
            inputs["latents"],
            inputs["t"],
            denoiser.conditions(text, valid, inputs["mel"], inputs["motion"]),
            denoiser.dit.reference_keys_values(inputs["reference"]),
            chunk_ids=chunk_ids,
            window=config.stream.window,
            reference_distance=distance,
        )

    return run


def run_sequence(setting, chunk_ids, distance=8.0, **changes):
    config, _, params, inputs = setting
    return compiled_sequence(config)(params, inputs | changes, chunk_ids, jnp.full(2, distance))


def run_chunks(setting, config):
    _, models, params, inputs = setting
    size, n = config.stream.chunk, config.tokens_per_frame

    @jax.jit
    def start(params, inputs):
        denoiser = models.denoiser.bind(params)
        state = install_reference(init_state(config, 2), denoiser.dit.reference_keys_values(inputs["reference"]))
        return state, denoiser.text_conditions(inputs["tokens"], inputs["valid"])

    state, text = start(params, inputs)

    @jax.jit
    def run(params, state, text, latents, t, mel, motion):
        denoiser = models.denoiser.bind(params)
        places = grid_positions(slot_times(config, state.ring_count), *config.token_grid)
        rotated = rotate(state.dit_k, rope_tables(*places, config.dit.head_dim))
        velocity, own = denoiser.dit.forward_chunk(
            latents,
            t,
            denoiser.conditions(*text, mel, motion),
            KeysValues(rotated, state.dit_v),
            fixed_slots=(1 + config.stream.sink) * n,
            fixed_valid=(1 + state.sink_count) * n,
            ring_valid=jnp.minimum(state.ring_count, config.stream.window) * n,
            kept=size,
        )
        return velocity, write_chunk(config, state, own)

    out = []
    for first in range(0, FRAMES, size):
        part = slice(first, first + size)
        velocity, state = run(params, state, text, *(inputs[name][:, part] for name in ("latents", "t", "mel", "motion")))
        out.append(velocity)
    assert run._cache_size() == 1
    return jnp.concatenate(out, axis=1)


def test_chunks_through_the_cache_equal_the_whole_sequence(setting):
    config = setting[0]
    chunk_ids = jnp.broadcast_to(jnp.arange(FRAMES) // config.stream.chunk, (2, FRAMES))
    whole = run_sequence(setting, chunk_ids)
    chunked = run_chunks(setting, config)
    assert np.std(whole) > 0.1
    np.testing.assert_allclose(chunked, whole, atol=1e-4)


def test_the_window_evicts(setting):
    """A frame further back than the window has no influence; one inside it has."""
    config = setting[0]
    chunk_ids = jnp.broadcast_to(jnp.arange(FRAMES) // config.stream.chunk, (2, FRAMES))
    before = run_sequence(setting, chunk_ids)
    changed = setting[3]["latents"].at[:, 0].add(1.0)
    difference = np.abs(run_sequence(setting, chunk_ids, latents=changed) - before).max(axis=(0, 2, 3, 4))
    # One layer sees `window` frames before its chunk; two layers reach twice as far, and no further.
    reach = 2 * (config.stream.window + config.stream.chunk)
    assert (difference[: config.stream.chunk + config.stream.window] > 1e-4).all()
    assert (difference[reach:] == 0).all()


def test_the_future_has_no_influence_on_a_causal_pass_and_has_on_a_bidirectional_one(setting):
    config = setting[0]
    causal = jnp.broadcast_to(jnp.arange(FRAMES) // config.stream.chunk, (2, FRAMES))
    changed = setting[3]["latents"].at[:, -1].add(1.0)
    for chunk_ids, leaks in ((causal, False), (jnp.zeros_like(causal), True)):
        difference = np.abs(run_sequence(setting, chunk_ids, latents=changed) - run_sequence(setting, chunk_ids))
        assert (difference[:, : -config.stream.chunk].max() > 1e-4) == leaks


def test_position_alone_tells_the_reference_apart(setting):
    """The same reference further away in time gives another output; a batch row does not see another row's reference."""
    chunk_ids = jnp.zeros((2, FRAMES), jnp.int32)
    near, far = run_sequence(setting, chunk_ids, 4.0), run_sequence(setting, chunk_ids, 30.0)
    assert np.abs(near - far).max() > 1e-3
    changed = setting[3]["reference"].at[1].add(1.0)
    difference = np.abs(run_sequence(setting, chunk_ids, 4.0, reference=changed) - near).max(axis=(1, 2, 3, 4))
    assert difference[0] == 0 and difference[1] > 1e-3


def test_motion_moves_its_own_frame_and_those_that_see_it(setting):
    """Every frame a chunk of its own: what is new in frame 6 changes it, later frames through their window, and no earlier one."""
    chunk_ids = jnp.broadcast_to(jnp.arange(FRAMES), (2, FRAMES))
    changed = setting[3]["motion"].at[0, 6, 2].add(1.0)
    difference = np.abs(run_sequence(setting, chunk_ids, motion=changed) - run_sequence(setting, chunk_ids)).max(axis=(2, 3, 4))
    assert (difference[0, :6] == 0).all() and (difference[0, 6:] > 1e-4).all() and (difference[1] == 0).all()


def test_audio_reaches_its_own_frame_first(setting):
    """Frame-wise audio attention: with every frame its own chunk and no window left, sound n changes frame n alone."""
    config, models, params, inputs = setting
    encode = jax.jit(lambda params, mel: models.denoiser.bind(params).audio(mel))
    mel = inputs["mel"]
    base, changed = encode(params, mel), encode(params, mel.at[:, 3].add(1.0))
    difference = np.abs(base - changed).max(axis=(0, 2, 3))
    assert difference[3] > 1e-3 and (np.delete(difference, 3) == 0).all()


def test_padding_of_the_prompt_has_no_influence(setting):
    config, models, params, inputs = setting
    chunk_ids = jnp.zeros((2, FRAMES), jnp.int32)
    before = run_sequence(setting, chunk_ids)
    padded = inputs["tokens"].at[0, 0, 3:].set(1)
    np.testing.assert_allclose(run_sequence(setting, chunk_ids, tokens=padded)[0], before[0], atol=1e-5)
    real = inputs["tokens"].at[0, 0, 1].set((inputs["tokens"][0, 0, 1] + 1) % 60)
    assert np.abs(run_sequence(setting, chunk_ids, tokens=real)[0] - before[0]).max() > 1e-3


def test_prompts_per_latent_frame(setting):
    """Two prompts with an index per frame give what each prompt alone gives, frame by frame, in one layer of text."""
    config, models, params, inputs = setting
    encode = jax.jit(lambda params, *prompts: models.denoiser.bind(params).text_conditions(*prompts))
    tokens = jnp.stack([inputs["tokens"][:, 0], inputs["tokens"][::-1, 0]], axis=1)
    valid = jnp.array([[3, 6], [6, 3]])
    index = jnp.array([[0] * 5 + [1] * 5] * 2)
    kv, per_frame = encode(params, tokens, valid, index)
    alone, _ = encode(params, tokens[:, :1], valid[:, :1])
    other, _ = encode(params, tokens[:, 1:], valid[:, 1:])
    np.testing.assert_allclose(kv.k[:, :, :5], jnp.broadcast_to(alone.k, kv.k[:, :, :5].shape), atol=1e-6)
    np.testing.assert_allclose(kv.v[:, :, 5:], jnp.broadcast_to(other.v, kv.v[:, :, 5:].shape), atol=1e-6)
    assert per_frame.tolist() == [[3] * 5 + [6] * 5, [6] * 5 + [3] * 5]


def test_timestep_embedding_against_float64():
    t = np.array([0.0, 0.3, 1.0])
    frequency = 10_000.0 ** (-np.arange(16) / 16)
    angle = 1000.0 * t[:, None] * frequency
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(t), 32), expected, atol=1e-3)
