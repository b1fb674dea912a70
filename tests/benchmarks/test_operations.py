"""Operation counts against counts by hand, and the sizes that the presets promise."""

import functools

import jax
import jax.numpy as jnp
import pytest

from configs import preset
from pikastream_jax.audio.slices import max_chunk_samples
from pikastream_jax.dit.model import Conditions, KeysValues
from pikastream_jax.flash_vae.latents import LatentStatistics
from pikastream_jax.nn.layers import parameter_count
from pikastream_jax.nn.operations import matrix_operations
from pikastream_jax.streaming.state import StepInputs, init_state
from pikastream_jax.streaming.step import ModelParams, Models, generate_step


@functools.cache
def models(name):
    return Models.of(preset(name, attention="xla"))


def linear(i, o):
    return i * o + o


def dit_by_hand(c):
    """Parameters of the DiT, layer by layer."""
    d = c.dim
    self_attention = 4 * linear(d, d) + 2 * d
    text = 4 * linear(d, d) + 2 * d + 2 * d  # and the affine LayerNorm before it
    audio = 2 * linear(d, d) + 2 * linear(c.audio_dim, d) + 2 * d + 2 * d
    block = 6 * d + self_attention + text + audio + linear(d, c.mlp_dim) + linear(c.mlp_dim, d)
    token = c.patch**2 * c.latent_channels
    embeddings = linear(token, d) + linear(c.text_dim, d) + linear(d, d) + linear(c.frequency_dim, d) + linear(d, d) + linear(d, 6 * d)
    return c.blocks * block + embeddings + c.motion * d + 2 * d + linear(d, token)


PARAMETERS = {"tiny": 8_516_416, "base_1_3b": 1_626_943_536, "pikastream_9b": 9_141_917_888}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_presets(name):
    found = parameter_count(models(name).denoiser.abstract["dit"])
    assert found == dit_by_hand(preset(name).dit) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["pikastream_9b", "base_1_3b"])
def test_operations_of_a_denoising_pass(name):
    """One forward pass over a chunk with a full window; keys and values of text and sound are not made anew."""
    config = preset(name)
    dit, stream, n = config.dit, config.stream, config.tokens_per_frame
    b, f = 1, stream.chunk
    shape = jax.ShapeDtypeStruct

    def keys_values(*middle):
        return KeysValues(*(shape((dit.blocks, b, *middle, dit.heads, dit.head_dim), jnp.bfloat16),) * 2)

    conditions = Conditions(
        keys_values(1, config.text.length),
        shape((b, 1), jnp.int32),
        keys_values(f, config.audio.tokens),
        shape((b, f, dit.motion), jnp.float32),
    )
    slots = (1 + stream.window) * n
    counts = shape((b,), jnp.int32)

    def forward(params, latents, t, conditions, cache, fixed, ring):
        module = models(name).denoiser.bind(params).dit
        return module.forward_chunk(latents, t, conditions, cache, fixed_slots=n, fixed_valid=fixed, ring_valid=ring, kept=f)

    latents = shape((b, f, *config.latent_grid, dit.latent_channels), jnp.float32)
    found = matrix_operations(
        forward, models(name).denoiser.abstract, latents, shape((b, f), jnp.float32), conditions, keys_values(slots), counts, counts
    )
    d, tokens = dit.dim, f * n
    per_token = 4 * d * d + 2 * d * d + 2 * d * d + 2 * d * dit.mlp_dim  # self; text and audio queries and outputs; MLP
    keys = slots + tokens + config.text.length + config.audio.tokens
    blocks = dit.blocks * tokens * (2 * per_token + 4 * keys * d)
    ends = 2 * tokens * 2 * d * dit.patch**2 * dit.latent_channels
    time = 2 * f * (dit.frequency_dim * d + d * d + dit.motion * d + 6 * d * d)
    assert found == blocks + ends + time
    assert found / 1e12 == pytest.approx({"pikastream_9b": 22.0, "base_1_3b": 43.1}[name], rel=0.01)


def test_operations_of_a_decoded_latent_frame_at_480p():
    """1.1 TFLOP +-10%: a smaller decoder would be faster and worse."""
    config = preset("pikastream_9b")
    vae, (rows, columns) = models("pikastream_9b").flash_vae, config.latent_grid
    cache = jax.eval_shape(lambda: vae.bind(zeros(vae.abstract)).init_decode_cache(1, rows, columns))
    latent = jax.ShapeDtypeStruct((1, rows, columns, 48), jnp.float32)
    found = matrix_operations(lambda params, *args: vae.bind(params).decode_step(*args), vae.abstract, cache, latent)
    n, d, r = rows * columns, 1024, 512
    backbone = 12 * n * (2 * (d * (d + 2 * 256) + d * d + 6 * d * d) + 4 * 3 * n * d)
    refine = 4 * 4 * n * (2 * (4 * r * r + 6 * r * r) + 4 * 4 * n * r)
    ends = 2 * n * 48 * d + 2 * n * d * 4 * r + 2 * 4 * n * (r * 1024 + 1024 * 768)
    assert found == backbone + refine + ends
    assert 0.99e12 <= found <= 1.21e12


def zeros(tree):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def test_the_rolling_schedule_costs_what_the_sequential_one_does():
    """One pass over four chunks for four passes over one: the same products on tokens, more attention."""
    counts = {}
    for schedule in ("sequential", "rolling"):
        config = preset("pikastream_9b", attention="xla", schedule=schedule)
        served = Models.of(config)
        params = ModelParams(served.denoiser.abstract, served.flash_vae.abstract, statistics(48))
        state = jax.eval_shape(lambda config=config: init_state(config, 1))
        inputs = StepInputs(
            jax.ShapeDtypeStruct((1, max_chunk_samples(config)), jnp.float32), jax.ShapeDtypeStruct((1, 3), jnp.int32)
        )
        counts[schedule] = matrix_operations(functools.partial(generate_step, served), params, state, inputs)
    assert counts["sequential"] / 1e12 == pytest.approx(91.3, abs=0.05), "what docs/performance.md says of a chunk"
    assert 1.0 < counts["rolling"] / counts["sequential"] < 1.15


def statistics(channels):
    return LatentStatistics(*(jax.ShapeDtypeStruct((channels,), jnp.float32),) * 2)
