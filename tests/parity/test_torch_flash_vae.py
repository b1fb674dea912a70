"""The PyTorch twin of FlashVAE against the JAX one, in float32, frame by frame over a filling and an evicting window."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks.torch_path.flash_vae import FlashVAE
from pikastream_jax.flash_vae import FlashVAE as JaxFlashVAE
from pikastream_jax.nn.layers import functional
from tests.parity.compare import close, filled, to_torch
from tests.small import randomised, small_config

pytestmark = pytest.mark.parity
FRAMES = 6  # the window holds 2


@pytest.fixture(scope="module", params=[2, 0], ids=["windows", "whole picture"])
def pair(request):
    config = small_config()
    config = dataclasses.replace(config, flash_vae=dataclasses.replace(config.flash_vae, refine_window=request.param))
    model = functional(lambda rngs: JaxFlashVAE(config.flash_vae, rngs=rngs))
    params = randomised(model.abstract, 3)
    return config, model, params, filled(FlashVAE(config.flash_vae), params)


def test_encode_step(pair):
    config, model, params, twin = pair
    step = jax.jit(lambda params, cache, frames: model.bind(params).encode_step(cache, frames))
    cache = model.bind(params).init_encode_cache(2, *config.latent_grid)
    twin_cache = twin.encoder.init_cache(2, *config.latent_grid, "cpu", twin.patch_in.weight.dtype)
    for index in range(FRAMES):
        frames = np.random.default_rng(index).uniform(-1.0, 1.0, (2, 4, 48, 32, 3)).astype(np.float32)
        cache, expected = step(params, cache, frames)
        twin_cache.place()
        for name, one, other in zip(("mean", "log variance"), twin.encode_step(twin_cache, to_torch(frames)), expected, strict=True):
            close(f"FlashVAE.encode_step, {name}", one, other)
        twin_cache.advance()


def test_decode_step(pair):
    config, model, params, twin = pair
    step = jax.jit(lambda params, cache, latent: model.bind(params).decode_step(cache, latent))
    cache = model.bind(params).init_decode_cache(2, *config.latent_grid)
    twin_cache = twin.decoder.init_cache(2, *config.latent_grid, "cpu", twin.latent_in.weight.dtype)
    tables = twin.upsampler.tables(*config.latent_grid, "cpu")
    for index in range(FRAMES):
        latent = np.random.default_rng(index).normal(size=(2, *config.latent_grid, 4)).astype(np.float32)
        cache, expected = step(params, cache, latent)
        twin_cache.place()
        close("FlashVAE.decode_step", twin.decode_step(twin_cache, to_torch(latent), tables), expected)
        twin_cache.advance()
    assert twin_cache.full


def test_upsampler(pair):
    config, model, params, twin = pair
    rows, columns = config.latent_grid
    x = np.random.default_rng(0).normal(size=(2, rows * columns, config.flash_vae.decoder_dim)).astype(np.float32)
    expected = jax.jit(lambda params, x: model.bind(params).upsampler(x, rows, columns))(params, x)
    close("Upsampler", twin.upsampler(to_torch(x), twin.upsampler.tables(rows, columns, "cpu"), rows, columns), expected)


def test_windows_must_tile_the_grid():
    with pytest.raises(ValueError, match="refine_window 2 does not divide 5x4 latents"):
        FlashVAE(small_config().flash_vae).upsampler.tables(5, 4, "cpu")
