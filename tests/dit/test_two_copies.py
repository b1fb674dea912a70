"""Causal adaptation trains what inference computes: its one pass over two copies equals the stream's chunk after chunk.

The context copy stands at the solver's last timestep and fills the cache, the query copy stands anywhere and reads it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.diffusion.flow import solver_timesteps
from pikastream_jax.dit.model import KeysValues
from pikastream_jax.nn.rope import grid_positions, rope_tables, rotate
from pikastream_jax.streaming.state import init_state, install_reference
from pikastream_jax.streaming.step import slot_times, write_chunk
from tests.small import small_config, small_models

CONFIG = small_config()
SIZE, CHUNKS, BATCH = CONFIG.stream.chunk, 5, 2
FRAMES = SIZE * CHUNKS  # 10: the window of 4 evicts
MODELS, PARAMS = small_models(CONFIG)


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(3)
    rows, columns = CONFIG.latent_grid
    times = solver_timesteps(CONFIG.stream.steps, CONFIG.stream.shift)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "context": normal(BATCH, FRAMES, rows, columns, 4),
        "query": normal(BATCH, FRAMES, rows, columns, 4),
        "t_context": jnp.full((BATCH, FRAMES), times[-2]),  # the last one evaluated; the very last is 0
        "t_query": jnp.repeat(jnp.asarray(rng.choice(times[:-1], (BATCH, CHUNKS)), jnp.float32), SIZE, axis=1),
        "mel": normal(BATCH, FRAMES, CONFIG.audio.mel_frames, CONFIG.audio.mels),
        "motion": normal(BATCH, FRAMES, CONFIG.dit.motion),
        "reference": normal(BATCH, rows, columns, 4),
        "tokens": jnp.asarray(rng.integers(3, 60, (BATCH, 1, CONFIG.text.length)), jnp.int32),
        "valid": jnp.array([[2], [5]]),
    }


@jax.jit
def two_copies(params, given):
    denoiser = MODELS.denoiser.bind(params)
    text, valid = denoiser.text_conditions(given["tokens"], given["valid"])
    once = denoiser.conditions(text, valid, given["mel"], given["motion"])
    audio = jax.tree.map(lambda kv: jnp.concatenate([kv, kv], axis=2), once.audio)
    twice = dataclasses.replace(once, audio=audio, motion=jnp.concatenate([once.motion, once.motion], axis=1))
    velocity = denoiser.dit.forward_sequence(
        jnp.concatenate([given["context"], given["query"]], axis=1),
        jnp.concatenate([given["t_context"], given["t_query"]], axis=1),
        twice,
        denoiser.dit.reference_keys_values(given["reference"]),
        chunk_ids=jnp.broadcast_to(jnp.arange(FRAMES) // SIZE, (BATCH, FRAMES)),
        window=CONFIG.stream.window,
        reference_distance=jnp.full(BATCH, float(CONFIG.stream.reference_distance)),
        copies=2,
    )
    return velocity[:, :FRAMES], velocity[:, FRAMES:]


@jax.jit
def chunk_by_chunk(params, given):
    """The query's chunk reads the cache and leaves no trace; the context's chunk reads it and is written to it."""
    denoiser = MODELS.denoiser.bind(params)
    n = CONFIG.tokens_per_frame
    text, valid = denoiser.text_conditions(given["tokens"], given["valid"])
    state = install_reference(init_state(CONFIG, BATCH), denoiser.dit.reference_keys_values(given["reference"]))

    def chunk(state, part):
        places = grid_positions(slot_times(CONFIG, state.ring_count), *CONFIG.token_grid)
        cache = KeysValues(rotate(state.dit_k, rope_tables(*places, CONFIG.dit.head_dim)), state.dit_v)
        conditions = denoiser.conditions(text, valid, part["mel"], part["motion"])

        def forward(latents, t):
            return denoiser.dit.forward_chunk(
                latents,
                t,
                conditions,
                cache,
                fixed_slots=n,
                fixed_valid=jnp.full(BATCH, n),
                ring_valid=jnp.minimum(state.ring_count, CONFIG.stream.window) * n,
                kept=SIZE,
            )

        query, _ = forward(part["query"], part["t_query"])
        context, own = forward(part["context"], part["t_context"])
        return write_chunk(CONFIG, state, own), (context, query)

    def by_chunk(leaf):  # [b, f, ...] -> [chunks, b, chunk, ...]
        return leaf.reshape(BATCH, CHUNKS, SIZE, *leaf.shape[2:]).swapaxes(0, 1)

    parts = {name: by_chunk(given[name]) for name in ("context", "query", "t_context", "t_query", "mel", "motion")}
    _, velocities = jax.lax.scan(chunk, state, parts)
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(given["context"].shape), velocities)


def test_the_training_pass_equals_inference(given):
    trained_context, trained_query = two_copies(PARAMS.denoiser, given)
    context, query = chunk_by_chunk(PARAMS.denoiser, given)
    assert np.std(trained_query) > 0.1 and np.std(trained_context) > 0.1
    np.testing.assert_allclose(query, trained_query, atol=1e-4)
    np.testing.assert_allclose(context, trained_context, atol=1e-4)


def test_what_a_query_chunk_sees(given):
    """Its own noisy frames and the earlier context; neither the clean version of itself nor any other query."""
    before = two_copies(PARAMS.denoiser, given)
    start, stop = 2 * SIZE, 3 * SIZE

    def moved(name):
        changed = given | {name: given[name].at[:, start:stop].add(1.0)}
        after = two_copies(PARAMS.denoiser, changed)
        return [np.abs(a - b).max(axis=(0, 2, 3, 4)) for a, b in zip(after, before, strict=True)]

    context, query = moved("query")
    assert (context == 0).all(), "the context copy knows nothing of the query copy"
    assert (query[start:stop] > 1e-3).all() and (np.delete(query, range(start, stop)) == 0).all()
    context, query = moved("context")
    assert (query[:stop] == 0).all(), "the answer must not leak into the chunk's own query"
    assert (query[stop:] > 1e-4).all()
