"""Random weights and states of any preset, drawn on the device in the shapes and types that are served, with no float32 copy of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.ceilings import random_e4m3
from pikastream_jax.audio.slices import chunk_sample_counts, max_chunk_samples
from pikastream_jax.config import Config
from pikastream_jax.flash_vae import KVCache
from pikastream_jax.flash_vae.latents import LatentStatistics
from pikastream_jax.nn.layers import Params
from pikastream_jax.streaming.serving_form import serving_models
from pikastream_jax.streaming.state import StepInputs, StreamState, init_state
from pikastream_jax.streaming.step import ModelParams, Models


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: Array, scale: float, mean: float, shape: tuple[int, ...], dtype: str) -> Array:
    return (mean + scale * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)


_e4m3 = functools.partial(jax.jit, static_argnames="shape")(random_e4m3)


def draw_params(abstract: Params, key: Array) -> Params:
    """Weights of an abstract module; nothing is left at zero, and signals keep their size through the layers."""
    drawn = {}
    for index, (name, leaf) in enumerate(abstract.items()):
        own = jax.random.fold_in(key, index)
        if isinstance(leaf, dict):
            drawn[name] = draw_params(leaf, own)
        elif leaf.dtype == jnp.float8_e4m3fn:
            drawn[name] = _e4m3(own, shape=leaf.shape)
        elif name == "scale" and "kernel" in abstract:  # of a Float8Linear: e4m3 values of size 100 become weights of size in ** -0.5
            drawn[name] = _normal(own, 0.0, 0.01 * abstract["kernel"].shape[1] ** -0.5, leaf.shape, leaf.dtype.name)
        elif name == "scale":
            drawn[name] = _normal(own, 0.1, 1.0, leaf.shape, leaf.dtype.name)
        else:
            size = leaf.shape[0] ** -0.5 if name == "kernel" else 0.1
            drawn[name] = _normal(own, size, 0.0, leaf.shape, leaf.dtype.name)
    return drawn


def abstract_statistics(config: Config) -> LatentStatistics:
    return LatentStatistics(*(jax.ShapeDtypeStruct((config.flash_vae.latent_channels,), jnp.float32),) * 2)


def abstract_params(models: Models) -> ModelParams:
    """Shapes of everything that `generate_step` takes as weights."""
    return ModelParams(models.denoiser.abstract, models.flash_vae.abstract, abstract_statistics(models.config))


def statistics(config: Config) -> LatentStatistics:
    channels = config.flash_vae.latent_channels
    return LatentStatistics(jnp.zeros(channels), jnp.ones(channels))


@functools.lru_cache(maxsize=2)
def served_models(config: Config) -> Models:
    """The graphs in serving form."""
    return serving_models(Models.of(config))


def model_params(models: Models) -> ModelParams:
    """Random weights of both models."""
    keys = jax.random.split(jax.random.key(0))
    return ModelParams(
        draw_params(models.denoiser.abstract, keys[0]), draw_params(models.flash_vae.abstract, keys[1]), statistics(models.config)
    )


def full_cache(abstract: KVCache, key: Array, window: int) -> KVCache:
    """FlashVAE's window with random content, full."""
    k, v = (_normal(own, 1.0, 0.0, leaf.shape, leaf.dtype.name) for own, leaf in zip(jax.random.split(key), (abstract.k, abstract.v), strict=True))
    return KVCache(k, v, jnp.full(abstract.count.shape, window, jnp.int32))


def full_state(config: Config) -> StreamState:
    """One stream whose windows are full, all caches and the prompt random."""
    abstract = jax.eval_shape(lambda: init_state(config, 1))
    leaves, tree = jax.tree.flatten(abstract)
    drawn = []
    for index, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            drawn.append(_normal(jax.random.key(index), 1.0, 0.0, leaf.shape, leaf.dtype.name))
        else:
            drawn.append(jnp.zeros(leaf.shape, leaf.dtype))
    state = jax.tree.unflatten(tree, drawn)
    return dataclasses.replace(
        state,
        text_valid=jnp.full((1, 1), config.text.length, jnp.int32),
        vae=full_cache(abstract.vae, jax.random.key(99), config.flash_vae.window),
        sink_count=jnp.full(1, config.stream.sink, jnp.int32),
        ring_count=jnp.full(1, config.stream.window, jnp.int32),
        rng=jnp.array([[1, 2]], jnp.uint32),
    )


class Sound:
    """Random samples, chunk by chunk, on the host: what `Session.step` takes, and how it hands them over."""

    def __init__(self, config: Config):
        self._config, self._chunk = config, 0
        self._samples = 0.1 * np.random.default_rng(0).normal(size=(4, 1, max_chunk_samples(config))).astype(np.float32)

    def next(self) -> StepInputs:
        """The next chunk's inputs, on the device."""
        counts = chunk_sample_counts(self._config, self._chunk * self._config.stream.chunk)
        self._chunk += 1
        return StepInputs(jnp.asarray(self._samples[self._chunk % 4]), jnp.asarray([counts], jnp.int32))


def abstract_inputs(config: Config) -> StepInputs:
    return StepInputs(
        jax.ShapeDtypeStruct((1, max_chunk_samples(config)), jnp.float32), jax.ShapeDtypeStruct((1, config.stream.chunk), jnp.int32)
    )


def bytes_of(tree: Any) -> int:
    """Of all arrays or shapes in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
