"""Token numbers -> text tokens; trained before the DiT (`training/text_pretrain.py`) and kept as it then is."""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import frame_attention
from pikastream_jax.config import TextConfig
from pikastream_jax.nn.attention import Block
from pikastream_jax.nn.layers import RMSNorm


class TextEncoder(nnx.Module):
    """A small bidirectional Transformer over a prompt."""

    def __init__(self, config: TextConfig, *, impl: str = "auto", rngs: nnx.Rngs):
        self.impl = impl
        self.embedding_table = nnx.Param(0.5 * rngs.params.normal((config.vocabulary, config.dim)))
        self.position_table = nnx.Param(0.1 * rngs.params.normal((config.length, config.dim)))
        self.blocks = nnx.List([Block(config.dim, config.heads, config.heads, 3.0, rngs=rngs) for _ in range(config.blocks)])
        self.norm_out = RMSNorm(config.dim)

    def __call__(self, tokens: Int[Array, "b l"], valid: Int[Array, "b"]) -> Float[Array, "b l d"]:
        """Args: `tokens` padded token numbers, of which the first `valid` count."""
        x = self.embedding_table[...][tokens] + self.position_table[...]
        x = x[:, None]  # one group to a prompt
        for block in self.blocks:
            x = block(x, functools.partial(frame_attention, valid=valid[:, None], impl=self.impl))
        return jnp.squeeze(self.norm_out(x), 1)
