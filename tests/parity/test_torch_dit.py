"""The PyTorch twin of the DiT against the JAX one, in float32: a block, a reference, chunks through a filling and evicting cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks.torch_path.cache import LayerCache, RollingCache
from benchmarks.torch_path.encoders import Denoiser
from benchmarks.torch_path.rope import Rope
from pallas_kernels import frame_attention
from pikastream_jax.dit.model import Conditions, KeysValues
from pikastream_jax.nn.rope import grid_positions, rope_tables, rotate
from pikastream_jax.streaming.state import init_state, install_reference
from pikastream_jax.streaming.step import slot_times, write_chunk
from tests.parity.compare import close, filled, to_torch
from tests.small import small_config, small_models

pytestmark = pytest.mark.parity
BATCH, CHUNKS = 2, 7


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def pair(config):
    models, params = small_models(config)
    return models.denoiser, params.denoiser, filled(Denoiser(config), params.denoiser)


def test_block():
    """One block over two latent frames that see themselves alone, with prompt and sound."""
    config = small_config()
    model, params, twin = pair(config)
    dit = config.dit
    n, f, length, tokens = config.tokens_per_frame, 2, config.text.length, config.audio.tokens
    x, time = normal(0, BATCH, f, n, dit.dim), normal(1, BATCH, f, 6, dit.dim)
    text = normal(2, 2, BATCH, 1, length, dit.heads, dit.head_dim)
    audio = normal(3, 2, BATCH, f, tokens, dit.heads, dit.head_dim)
    tables = rope_tables(*grid_positions(jnp.arange(1.0 - f, 1.0), *config.token_grid), dit.head_dim)

    def attend_self(q, k, v):
        q, k, v = (part.reshape(BATCH, 1, f * n, *part.shape[3:]) for part in (q, k, v))
        return frame_attention(rotate(q, tables), rotate(k, tables), v).reshape(BATCH, f, n, *q.shape[3:])

    def attend_text(q):
        return frame_attention(q.reshape(BATCH, 1, f * n, *q.shape[3:]), *text).reshape(q.shape)

    expected = model.bind(params).dit.blocks[1](x, time, attend_self, attend_text, lambda q: frame_attention(q, *audio))
    empty = (torch.zeros(BATCH, f * n, dit.heads, dit.head_dim) for _ in range(3))
    out = twin.dit.blocks[1](
        to_torch(x),
        to_torch(time),
        Rope(dit.head_dim, *config.token_grid, "cpu").tables(torch.arange(1.0 - f, 1.0)),
        LayerCache(*empty, torch.arange(f * n), 0, f * n),
        tuple(to_torch(text[:, :, 0])),
        tuple(to_torch(audio).flatten(1, 2)),
    )
    close("DiTBlock", out, expected)


def test_reference_keys_values():
    config = small_config()
    model, params, twin = pair(config)
    reference = normal(0, BATCH, *config.latent_grid, 4)
    expected = jax.jit(lambda params, x: model.bind(params).dit.reference_keys_values(x))(params, reference)
    rope = Rope(config.dit.head_dim, *config.token_grid, "cpu")
    for name, one in zip("kv", twin.dit.reference_keys_values(to_torch(reference), rope), strict=True):
        close(f"reference_keys_values {name}", one, getattr(expected, name))


def cache_slots(config, cache: RollingCache) -> list[int]:
    """The twin's slot of every valid slot of the JAX cache, reference | sink | ring, and the latter's slots."""
    stream, n = config.stream, config.tokens_per_frame
    ours, twin = [0], [stream.sink]
    for frame in range(cache.sink_count):
        chunk, inside = divmod(frame, stream.chunk)
        ours.append(1 + frame)
        twin.append(stream.sink - (chunk + 1) * stream.chunk + inside)
    for frame in range(max(0, cache.ring_count - stream.window), cache.ring_count):
        ours.append(1 + stream.sink + frame % stream.window)
        twin.append(stream.sink + 1 + frame % (stream.window + stream.chunk))
    return [[n * frame + token for frame in frames for token in range(n)] for frames in (ours, twin)]


@pytest.mark.parametrize("sink", [0, 2])
def test_forward_chunk_through_the_cache(sink):
    """First chunk, filling sink and ring, full, evicting; a new reference after the fifth chunk, which empties the sink."""
    config = small_config(sink=sink)
    model, params, twin = pair(config)
    stream, n, dit = config.stream, config.tokens_per_frame, config.dit
    text = normal(1, BATCH, 1, config.text.length, config.text.dim)
    valid = np.full((BATCH, 1), 4)

    @jax.jit
    def run(params, state, latents, t, audio, motion):
        denoiser = model.bind(params)
        places = grid_positions(slot_times(config, state.ring_count), *config.token_grid)
        velocity, own = denoiser.dit.forward_chunk(
            latents,
            t,
            Conditions(denoiser.dit.text_keys_values(text), valid, denoiser.dit.audio_keys_values(audio), motion),
            KeysValues(rotate(state.dit_k, rope_tables(*places, dit.head_dim)), state.dit_v),
            fixed_slots=(1 + stream.sink) * n,
            fixed_valid=(1 + state.sink_count) * n,
            ring_valid=jnp.minimum(state.ring_count, stream.window) * n,
            kept=stream.chunk,
        )
        return velocity, write_chunk(config, state, own)

    rope = Rope(dit.head_dim, *config.token_grid, "cpu")
    cache = RollingCache(
        rope,
        layers=dit.blocks,
        batch=BATCH,
        heads=dit.heads,
        head_dim=dit.head_dim,
        chunk=stream.chunk,
        window=stream.window,
        sink=sink,
        reference_distance=stream.reference_distance,
        device="cpu",
        dtype=torch.float32,
    )
    twin_text = twin.dit.text_keys_values(to_torch(text[:, 0, :4]))
    state = init_state(config, BATCH)
    for index in range(CHUNKS):
        if index in (0, 5):
            reference = normal(50 + index, dit.blocks, 2, BATCH, n, dit.heads, dit.head_dim)
            state = install_reference(state, KeysValues(*jnp.asarray(reference).swapaxes(0, 1)))
            rows = slice(sink * n, (sink + 1) * n)
            cache.raw[:, :, rows], cache.values[:, :, rows] = to_torch(reference).unbind(1)
            cache.sink_count = 0
        latents = normal(10 + index, BATCH, stream.chunk, *config.latent_grid, 4)
        t = np.random.default_rng(index).uniform(size=(BATCH, stream.chunk)).astype(np.float32)
        audio = normal(20 + index, BATCH, stream.chunk, config.audio.tokens, config.audio.dim)
        motion = normal(30 + index, BATCH, stream.chunk, dit.motion)
        expected, state = run(params, state, latents, t, audio, motion)

        cache.place()
        cache.turn()
        time = twin.dit.time(to_torch(t), to_torch(motion))
        velocity = twin.dit(to_torch(latents), time, twin_text, twin.dit.audio_keys_values(to_torch(audio)), cache)
        cache.advance()
        close("forward_chunk, velocity", velocity, expected)

        assert [cache.sink_count] * BATCH == state.sink_count.tolist()
        assert [cache.ring_count] * BATCH == state.ring_count.tolist()
        ours, theirs = cache_slots(config, cache)
        close("forward_chunk, cached keys", cache.raw[:, :, theirs], state.dit_k[:, :, np.array(ours)])
        close("forward_chunk, cached values", cache.values[:, :, theirs], state.dit_v[:, :, np.array(ours)])
    assert cache.full and cache.ring_count > stream.window
