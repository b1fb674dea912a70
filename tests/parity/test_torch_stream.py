"""Whole streams of the PyTorch twin against the JAX step; bfloat16, fp8 and the compiler against the twin itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks.torch_path import build, build_decoder
from benchmarks.torch_path.encoders import Denoiser
from benchmarks.torch_path.flash_vae import FlashVAE
from benchmarks.torch_path.fp8 import Linear8, quantise
from benchmarks.torch_path.weights import parameter_count
from configs import PRESETS, preset
from pikastream_jax.audio.mel import log_mel
from pikastream_jax.audio.slices import chunk_sample_counts, chunk_slices, max_chunk_samples
from pikastream_jax.dit.model import Conditions
from pikastream_jax.nn import layers as jax_layers
from pikastream_jax.streaming.package import SHIPPED, load_package, save_package
from pikastream_jax.streaming.state import StepInputs, init_state, install_prompt, install_reference
from pikastream_jax.streaming.step import Models, denoise_chunk, generate_step
from pikastream_jax.text import Tokenizer
from tests.parity.compare import WORST, close, to_torch
from tests.small import small_config, small_models

pytestmark = pytest.mark.parity
BATCH, CHUNKS, PROMPT = 2, 8, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw(config, rng, chunk):
    """A row's noise and motion, folded from its key as in `generate_step`."""
    key = jax.random.fold_in(jax.random.wrap_key_data(rng), chunk)
    motion = jax.random.normal(jax.random.fold_in(key, 1), (config.stream.chunk, config.dit.motion))
    shape = (config.stream.chunk, *config.latent_grid, config.flash_vae.latent_channels)
    return jax.random.normal(key, shape), motion


def start(models, params, reference, tokens, valid):
    """A JAX state with a face and a prompt in each row."""

    @jax.jit
    def installed(params):
        denoiser = models.denoiser.bind(params.denoiser)
        batch = reference.shape[0]
        state = install_reference(init_state(models.config, batch), denoiser.dit.reference_keys_values(reference))
        state = install_prompt(state, *denoiser.text_conditions(tokens[:, None], jnp.full((batch, 1), valid)))
        return dataclasses.replace(state, rng=jnp.arange(2 * batch, dtype=jnp.uint32).reshape(batch, 2))

    return installed(params)


@pytest.mark.parametrize("stream", [{}, {"sink": 2}, {"clean_pass": True, "steps": 3}], ids=str)
def test_stream(stream, tmp_path):
    """Random weights through a file, enough chunks to evict from both windows; a second reference on the way."""
    config = small_config(**stream)
    models, params = small_models(config)
    path = tmp_path / "small.safetensors"
    save_package(path, config, params, Tokenizer([], config.text.length), {})
    # The file holds bfloat16; both sides start from what it holds.
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    twin = build(config, "cpu", torch.float32, weights=path, batch=BATCH)
    tokens = np.random.default_rng(0).integers(0, 60, (BATCH, config.text.length))
    references = normal(1, 2, BATCH, *config.latent_grid, 4)
    state = start(models, params, references[0], tokens, PROMPT)
    twin.install_reference(to_torch(references[0]))
    twin.install_prompt(to_torch(tokens), PROMPT)

    @jax.jit
    def step(params, state, mel, noise, motion):
        denoiser = models.denoiser.bind(params.denoiser)
        heard = denoiser.dit.audio_keys_values(denoiser.audio(mel))
        state, latents = denoise_chunk(
            models, params.denoiser, state, Conditions(state.text, state.text_valid, heard, motion), noise
        )
        vae = models.flash_vae.bind(params.flash_vae)
        cache, frames = jax.lax.scan(vae.decode_step, state.vae, params.statistics.restore(latents).swapaxes(0, 1))
        pixels = jnp.clip(frames.swapaxes(0, 1).reshape(BATCH, -1, *frames.shape[3:]), -1.0, 1.0)
        return dataclasses.replace(state, vae=cache), latents, (pixels + 1.0) * 127.5

    @jax.jit
    def swap(params, state, reference):
        return install_reference(state, models.denoiser.bind(params.denoiser).dit.reference_keys_values(reference))

    for chunk in range(CHUNKS):
        if chunk == 5:
            state = swap(params, state, references[1])
            twin.install_reference(to_torch(references[1]))
        mel = normal(100 + chunk, BATCH, config.stream.chunk, config.audio.mel_frames, config.audio.mels)
        noise, motion = jax.vmap(functools.partial(draw, config, chunk=chunk))(state.rng)
        state, latents, pixels = step(params, state, mel, noise, motion)
        frames = twin.step(twin.denoiser.audio(to_torch(mel)), to_torch(noise), to_torch(motion))
        close("stream, latents", twin.latents, latents)
        # What is left of a pixel's error after rounding is half a level.
        assert np.abs(frames.numpy() - np.asarray(pixels)).max() < 0.51
        assert np.asarray(pixels).std() > 10
    assert twin.cache.full and twin.decoder.cache.full


def test_shipped_weights():
    """The shipped file, sound included, for one chunk: the frames of the service's own step."""
    package = load_package()
    config, models, params = package.config, package.models, package.params
    tokens, valid = package.tokenizer.encode("a woman smiling")
    reference = normal(0, 1, *config.latent_grid, config.flash_vae.latent_channels)
    state = start(models, params, reference, np.asarray(tokens)[None], int(valid))
    counts = jnp.asarray([chunk_sample_counts(config, 0)], jnp.int32)
    audio = 0.1 * normal(1, 1, max_chunk_samples(config))
    _, slices = chunk_slices(state.audio, audio, counts, config.audio.context_samples)
    mel = log_mel(slices, config.audio)
    noise, motion = jax.vmap(functools.partial(draw, config, chunk=0))(state.rng)
    _, expected = jax.jit(functools.partial(generate_step, models))(params, state, StepInputs(audio, counts))

    twin = build(config, "cpu", torch.float32, weights=SHIPPED)
    twin.install_reference(to_torch(reference))
    twin.install_prompt(to_torch(tokens)[None], int(valid))
    frames = twin.step(twin.denoiser.audio(to_torch(mel)), to_torch(noise), to_torch(motion))
    difference = np.abs(frames.numpy().astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01, "a rounding may fall the other way, rarely"
    assert frames.float().std() > 10


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    config = small_config()
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_package(path, config, small_models(config)[1], Tokenizer([], config.text.length), {})
    return path


def latents_of(path, dtype, fp8=False, chunks=4):
    """The last latents of a few chunks of the twin, from the same inputs in every precision."""
    stream = build(small_config(), "cpu", dtype, fp8, weights=path)
    stream.install_reference(to_torch(normal(0, 1, *stream.config.latent_grid, 4)))
    stream.install_prompt(torch.tensor([[1, 5, 9, 0, 0, 0]]), 3)
    for chunk in range(chunks):
        inputs = (stream.audio, stream.noise, stream.motion)
        stream.step(*(to_torch(normal(10 * chunk + index, *like.shape)) for index, like in enumerate(inputs)))
    return stream.latents


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_bfloat16_and_fp8_stay_close(small_file):
    exact = latents_of(small_file, torch.float32)
    rounded = relative(latents_of(small_file, torch.bfloat16), exact)
    quantised = relative(latents_of(small_file, torch.bfloat16, fp8=True), exact)
    WORST["bfloat16 stream against float32, root mean square"] = rounded
    WORST["fp8 stream against float32, root mean square"] = quantised
    assert 1e-3 < rounded < 0.03
    assert rounded < quantised < 0.15


def test_fp8_linear():
    """Every value is off by at most half a step of e4m3 (3 bits of mantissa: 1/16), row by row, whatever the rows' scales."""
    x = to_torch(normal(0, 5, 32)) * 10.0 ** torch.arange(-2.0, 3.0)[:, None]
    values, scale = quantise(x)
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)
    largest = x.abs().amax(dim=1, keepdim=True)
    assert ((values.float() * scale - x).abs() <= x.abs() / 16 + largest / 448 * 2.0**-10).all()
    linear = torch.nn.Linear(32, 48)
    eighth = Linear8(linear)
    weight, weight_scale = quantise(linear.weight.detach())
    expected = (values.double() * scale) @ (weight.double() * weight_scale).T + linear.bias.detach()
    torch.testing.assert_close(eighth(x.unflatten(0, (5, 1))).flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_fp8_kernel_gets_what_it_takes():
    """What runs on CUDA alone; newer versions of PyTorch have the same operator for CPUs."""
    x, eighth = to_torch(normal(0, 5, 32)).bfloat16(), Linear8(torch.nn.Linear(32, 48).bfloat16())
    try:
        out = eighth.scaled_product(*quantise(x), torch.bfloat16)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this PyTorch has no torch._scaled_mm for CPUs: {error}")
    torch.testing.assert_close(out, eighth(x), rtol=1e-2, atol=1e-2)


def test_fp8_needs_widths_of_16():
    config = small_config()
    with pytest.raises(ValueError, match="fp8: mlp.up is 48 -> 72; both must be multiples of 16"):
        build(dataclasses.replace(config, dit=dataclasses.replace(config.dit, mlp_dim=72)), "cpu", torch.bfloat16, fp8=True)


@pytest.mark.parametrize("blocks", [1, 3])
def test_one_program_for_all_blocks(monkeypatch, blocks):
    """What `Stream.compile` hands to the compiler: no graph breaks, and as many programs for three blocks as for one."""
    config = small_config()
    config = dataclasses.replace(
        config,
        dit=dataclasses.replace(config.dit, blocks=blocks),
        flash_vae=dataclasses.replace(config.flash_vae, decoder_blocks=blocks),
    )

    def filled_stream():
        stream = build(config, "cpu", torch.float32)
        stream.fill()
        return stream

    expected = filled_stream().step()
    compile_graph, programs = torch.compile, []

    def count(graph, example_inputs):
        programs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, mode: compile_graph(function, backend=count, fullgraph=True))
    torch._dynamo.reset()
    stream = filled_stream()
    stream.compile()
    frames = stream.step().clone()
    assert len(programs) == 12  # tables and turning for both caches, a block of either model, and six parts outside the blocks
    for _ in range(stream.config.stream.window):
        stream.step()
    assert len(programs) == 12, "nothing is compiled again as the ring goes round"
    torch.testing.assert_close(frames, expected, atol=1, rtol=0)


def test_a_filling_cache_is_not_captured():
    stream = build(small_config(), "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="no prompt: call install_prompt"):
        stream.step()
    stream.install_prompt(torch.tensor([[1, 5, 9, 0, 0, 0]]), 3)
    stream.step()
    with pytest.raises(RuntimeError, match="full caches can be captured: call fill, or step"):
        stream.capture()
    with pytest.raises(RuntimeError, match="full window can be captured: call fill, or decode"):
        build_decoder(small_config(), "cpu", torch.float32).capture()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parameter_counts(name):
    config = preset(name)
    models = Models.of(config)
    with torch.device("meta"):
        twins = Denoiser(config), FlashVAE(config.flash_vae)
    for twin, ours in zip(twins, (models.denoiser, models.flash_vae), strict=True):
        assert parameter_count(twin) == jax_layers.parameter_count(ours.abstract)
