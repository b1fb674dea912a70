"""The models as they are served: self-attention's three projections in one product, weights in the stream's precision.

Files and training keep one matrix per projection, Wan's names and float32; the change is made once, after loading.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from pikastream_jax.config import Config
from pikastream_jax.dit import Denoiser
from pikastream_jax.dit.block import DiTBlock, FusedSelfAttention
from pikastream_jax.nn.float8 import Float8Linear
from pikastream_jax.nn.layers import functional
from pikastream_jax.streaming.step import ModelParams, Models


def serving_models(trained: Models) -> Models:
    """The graphs of both models in serving form; `serving_params` gives their weights."""
    config = trained.config
    zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))
    return Models(
        config,
        functional(lambda _: _served_denoiser(config, trained.denoiser.bind(zeros(trained.denoiser.abstract)))),
        functional(lambda _: _cast(config, trained.flash_vae.bind(zeros(trained.flash_vae.abstract)))),
    )


def serving_params(trained: Models, params: ModelParams) -> ModelParams:
    """The weights for `serving_models(trained)`. Leaves that stay as they are share their memory with `params`."""
    config = trained.config
    denoiser = _served_denoiser(config, trained.denoiser.bind(params.denoiser))
    flash_vae = _cast(config, trained.flash_vae.bind(params.flash_vae))
    return ModelParams(
        nnx.to_pure_dict(nnx.state(denoiser, nnx.Param)), nnx.to_pure_dict(nnx.state(flash_vae, nnx.Param)), params.statistics
    )


def _served_denoiser(config: Config, denoiser: Denoiser) -> Denoiser:
    _cast(config, denoiser)
    for block in denoiser.dit.blocks:
        served_block(config.stream.precision, block)
    return denoiser


def served_block(precision: str, block: DiTBlock) -> DiTBlock:
    """The block in serving form, changed in place; its dtype stays."""
    block.self_attention = FusedSelfAttention(block.self_attention)
    if precision == "float8":
        # All products of a denoising step but the first and the last; keys and values of text and sound are made rarely.
        block.self_attention.qkv = Float8Linear(block.self_attention.qkv)
        block.self_attention.o = Float8Linear(block.self_attention.o)
        for attention in (block.text_attention, block.audio_attention):
            attention.q = Float8Linear(attention.q)
            attention.o = Float8Linear(attention.o)
        block.mlp.up = Float8Linear(block.mlp.up)
        block.mlp.down = Float8Linear(block.mlp.down)
    return block


def _cast(config: Config, module: nnx.Module) -> nnx.Module:
    dtype = jnp.dtype(config.stream.dtype)
    nnx.update(module, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(module, nnx.Param)))
    return module
