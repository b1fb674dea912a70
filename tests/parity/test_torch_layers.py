"""Layers, encoders and conditions of the PyTorch twin against the JAX modules, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from benchmarks.torch_path import dit, encoders, layers
from benchmarks.torch_path.rope import Rope, patchify, rotate, unpatchify
from pallas_kernels import frame_attention
from pikastream_jax.dit.model import timestep_embedding
from pikastream_jax.nn import attention, patch, rope
from pikastream_jax.nn import layers as jax_layers
from tests.parity.compare import close, filled, to_torch
from tests.small import randomised, small_config, small_models

pytestmark = pytest.mark.parity


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pair(build, twin, seed=0):
    """A JAX module and its twin with the same random parameters."""
    functional = jax_layers.functional(build)
    params = randomised(functional.abstract, seed)
    return functional.bind(params), filled(twin, params)


def test_rms_norm():
    ours, twin = pair(lambda rngs: jax_layers.RMSNorm(24), layers.RMSNorm(24))
    x = 3.0 * normal(0, 2, 5, 24)
    close("RMSNorm", twin(to_torch(x)), ours(x))


def test_layer_norms():
    x, shift, scale = 2.0 + normal(0, 2, 3, 5, 24), normal(1, 2, 3, 1, 24), normal(2, 2, 3, 1, 24)
    close(
        "modulated_layer_norm",
        dit.modulate(*map(to_torch, (x, shift, scale)), 1e-6),
        jax_layers.modulated_layer_norm(x, shift, scale),
    )
    ours, twin = pair(lambda rngs: nnx.LayerNorm(24, epsilon=1e-6, rngs=rngs), layers.LayerNorm(24, 1e-6))
    close("LayerNorm with parameters", twin(to_torch(x)), ours(x))


def test_mlp():
    ours, twin = pair(lambda rngs: jax_layers.MLP(8, 40, 12, rngs=rngs), layers.MLP(8, 40, 12))
    x = normal(0, 2, 5, 8)
    close("MLP", twin(to_torch(x)), ours(x))


@pytest.mark.parametrize("head_dim", [12, 24, 64, 128])
def test_rope(head_dim):
    times = np.array([-30.0, -3.0, 0.0, 8.0], np.float32)
    x = normal(0, 2, 4 * 3 * 5, 2, head_dim)
    tables = rope.rope_tables(*rope.grid_positions(jnp.asarray(times), 3, 5), head_dim)
    close("RoPE", rotate(to_torch(x), Rope(head_dim, 3, 5, "cpu").tables(to_torch(times))), rope.rotate(jnp.asarray(x), tables))


def test_patches():
    x = normal(0, 2, 3, 4, 6, 5)
    ours = patch.patchify(jnp.asarray(x), 2)
    close("patchify", patchify(to_torch(x), 2), ours, 0.0)
    close("unpatchify", unpatchify(to_torch(ours), 2, 2, 3), x, 0.0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_block(kv_heads):
    """Grouped-query attention with positions, inside a pre-norm block."""
    ours, twin = pair(lambda rngs: attention.Block(48, 4, kv_heads, 2.0, rngs=rngs), layers.Block(48, 4, kv_heads, 2.0))
    x = normal(0, 3, 6, 48)
    tables = rope.rope_tables(*rope.grid_positions(jnp.zeros(1), 2, 3), 12)

    def attend(q, k, v):
        q, k, v = (part[:, None] for part in (rope.rotate(q, tables), rope.rotate(k, tables), v))
        return frame_attention(q, k, v)[:, 0]

    for name, one, other in zip("qkv", twin.attention.project(to_torch(x)), ours.attention.project(jnp.asarray(x)), strict=True):
        close(f"GroupedQueryAttention.project {name}", one, other)
    close("Block", twin(to_torch(x), Rope(12, 2, 3, "cpu").tables(torch.zeros(1))), ours(jnp.asarray(x), attend))


@functools.cache
def denoisers():
    config = small_config()
    models, params = small_models(config)
    return config, models.denoiser.bind(params.denoiser), filled(encoders.Denoiser(config), params.denoiser)


def test_audio_encoder():
    config, ours, twin = denoisers()
    mel = normal(0, 2, 3, config.audio.mel_frames, config.audio.mels)
    close("AudioEncoder", twin.audio(to_torch(mel)), ours.audio(mel))
    assert torch.equal(twin.null_audio_table, to_torch(ours.null_audio_table[...]))


def test_text_encoder():
    config, ours, twin = denoisers()
    tokens = np.random.default_rng(0).integers(0, config.text.vocabulary, (3, config.text.length))
    valid = np.array([1, 4, 6])
    close("TextEncoder", twin.text(to_torch(tokens), to_torch(valid)), ours.text(tokens, valid))


def test_timestep():
    config, ours, twin = denoisers()
    t, motion = np.array([[0.0, 0.3], [0.77, 1.0]], np.float32), normal(0, 2, 2, config.dit.motion)
    close("timestep embedding", dit.timestep_embedding(to_torch(t), 32), timestep_embedding(t, 32))
    for name, one, other in zip(
        ("head", "blocks"), twin.dit.time(to_torch(t), to_torch(motion)), ours.dit._time(t, motion), strict=True
    ):
        close(f"time and motion, for the {name}", one, other)


def test_text_and_audio_keys_values():
    config, ours, twin = denoisers()
    text = normal(0, 2, config.text.length, config.text.dim)
    audio = normal(1, 2, 3, config.audio.tokens, config.audio.dim)
    expected = jax.tree.map(lambda leaf: leaf[:, :, 0], ours.dit.text_keys_values(text[:, None]))
    for name, one in zip("kv", twin.dit.text_keys_values(to_torch(text)), strict=True):
        close(f"text {name}, all layers", one, getattr(expected, name))
    expected = ours.dit.audio_keys_values(audio)
    for name, one in zip("kv", twin.dit.audio_keys_values(to_torch(audio)), strict=True):
        close(f"audio {name}, all layers", one.unflatten(1, (2, 3)), getattr(expected, name))
