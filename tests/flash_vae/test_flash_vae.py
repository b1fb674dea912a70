"""FlashVAE: streaming equals the clip, at any length, with a cache that never grows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import small_config, small_models


@pytest.fixture(scope="module")
def vae():
    config = small_config()
    models, params = small_models(config)
    return config, models.flash_vae, params.flash_vae


@pytest.fixture(scope="module")
def decode_step(vae):
    return jax.jit(lambda p, c, z: vae[1].bind(p).decode_step(c, z))


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_decoding_step_by_step_equals_decoding_the_clip(vae, decode_step, frames):
    config, model, params = vae
    latents = jax.random.normal(jax.random.key(frames), (2, frames, *config.latent_grid, 4))
    clip = jax.jit(lambda p, z: model.bind(p).decode(z))(params, latents)
    cache = model.bind(params).init_decode_cache(2, *config.latent_grid)
    shapes = jax.tree.map(jnp.shape, cache)
    out = []
    for index in range(frames):
        cache, video = decode_step(params, cache, latents[:, index])
        assert jax.tree.map(jnp.shape, cache) == shapes
        out.append(video)
    assert decode_step._cache_size() == 1
    assert np.std(clip) > 0.1
    assert clip.shape == (2, 4 * frames, 48, 32, 3)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), clip, atol=1e-4)


def test_encoding_step_by_step_equals_encoding_the_clip(vae):
    config, model, params = vae
    video = jax.random.uniform(jax.random.key(1), (2, 20, 48, 32, 3), minval=-1)
    clip, _ = jax.jit(lambda p, v: model.bind(p).encode(v))(params, video)
    step = jax.jit(lambda p, c, v: model.bind(p).encode_step(c, v))
    cache = model.bind(params).init_encode_cache(2, *config.latent_grid)
    out = []
    for index in range(5):
        cache, (mean, _) = step(params, cache, video[:, 4 * index : 4 * index + 4])
        out.append(mean)
    assert np.std(clip) > 0.1
    np.testing.assert_allclose(jnp.stack(out, axis=1), clip, atol=1e-4)


def test_the_window_is_what_a_frame_depends_on(vae):
    """In one layer a frame sees W past frames; two layers reach 2 W."""
    config, model, params = vae
    latents = jax.random.normal(jax.random.key(0), (1, 8, *config.latent_grid, 4))
    decode = jax.jit(lambda p, z: model.bind(p).decode(z))
    difference = np.abs(decode(params, latents.at[:, 1].add(1.0)) - decode(params, latents))
    per_latent = difference.reshape(8, -1).max(axis=1)
    assert per_latent[0] == 0, "the past does not see the future"
    assert (per_latent[1:4] > 1e-4).all()
    assert (per_latent[1 + 2 * config.flash_vae.window + 1 :] == 0).all()


def test_wrong_sizes_are_named(vae):
    config, model, params = vae
    with pytest.raises(ValueError, match="5 video frames are not a multiple of 4"):
        model.bind(params).encode(jnp.zeros((1, 5, 48, 32, 3)))
    with pytest.raises(ValueError, match="50x32 pixels is not a multiple of 8"):
        model.bind(params).encode(jnp.zeros((1, 4, 50, 32, 3)))


def test_the_window_stays_full_for_ever(vae):
    """A count whose tokens no longer fit into 32 bits."""
    config, model, params = vae
    rows, columns = config.latent_grid
    cache = model.bind(params).init_decode_cache(1, rows, columns)
    full = cache.k.shape[2]
    for count in (2 * full, 2**31 - 1):
        assert dataclasses.replace(cache, count=jnp.array([count])).ring_valid(rows * columns).tolist() == [full]
