"""Wan's block plus frame-wise audio cross-attention.

Structure and names follow Wan 2.1 (Apache-2.0), so that its checkpoints fit: q and k RMSNorm over the full width before the split
into heads, biases on all projections, one shared time projection added to a learned [6, d] table per block, GELU (tanh) MLP.
The attention itself is given by the caller: over a whole sequence, or over the rolling cache.

Tokens keep the dtype that they come in; norms, modulation and gates are computed in float32.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.config import DiTConfig
from pikastream_jax.nn.layers import MLP, RMSNorm, linear_of, modulated_layer_norm


class Attention(nnx.Module):
    """Projections of self- or cross-attention."""

    def __init__(self, config: DiTConfig, context_dim: int, *, rngs: nnx.Rngs, zero_output: bool = False):
        d = config.dim
        self.heads = config.heads
        self.q = nnx.Linear(d, d, rngs=rngs)
        self.k = nnx.Linear(context_dim, d, rngs=rngs)
        self.v = nnx.Linear(context_dim, d, rngs=rngs)
        zero = {"kernel_init": nnx.initializers.zeros_init()} if zero_output else {}
        self.o = nnx.Linear(d, d, rngs=rngs, **zero)
        self.norm_q = RMSNorm(d, config.eps)
        self.norm_k = RMSNorm(d, config.eps)

    def _split(self, x: Float[Array, "*b n d"]) -> Float[Array, "*b n h e"]:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def queries(self, x: Float[Array, "*b n d"]) -> Float[Array, "*b n h e"]:
        return self._split(self.norm_q(self.q(x)))

    def keys_values(self, context: Float[Array, "*b s c"]) -> tuple[Float[Array, "*b s h e"], Float[Array, "*b s h e"]]:
        """Keys after RMSNorm and before RoPE, and values."""
        return self._split(self.norm_k(self.k(context))), self._split(self.v(context))

    def project(self, x: Float[Array, "*b n d"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values of self-attention, each [*b, n, h, e], before RoPE."""
        return self.queries(x), *self.keys_values(x)

    def merge(self, attended: Float[Array, "*b n h e"]) -> Float[Array, "*b n d"]:
        return self.o(attended.reshape(*attended.shape[:-2], -1))


class FusedSelfAttention(nnx.Module):
    """Self-attention in serving form: queries, keys and values of one product, since XLA would join the three matrices anew in every step."""

    def __init__(self, attention: Attention):
        parts = (attention.q, attention.k, attention.v)
        self.heads, self.o = attention.heads, attention.o
        self.norm_q, self.norm_k = attention.norm_q, attention.norm_k
        kernel = jnp.concatenate([part.kernel[...] for part in parts], axis=1)
        self.qkv = linear_of(kernel, jnp.concatenate([part.bias[...] for part in parts]))

    _split, merge = Attention._split, Attention.merge

    def project(self, x: Float[Array, "*b n d"]) -> tuple[Array, Array, Array]:
        """See `Attention.project`."""
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        return self._split(self.norm_q(q)), self._split(self.norm_k(k)), self._split(v)


class DiTBlock(nnx.Module):
    """Self-attention, text cross-attention, audio cross-attention, MLP."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        d = config.dim
        self.modulation = nnx.Param(rngs.params.normal((6, d)) / d**0.5)
        self.self_attention = Attention(config, d, rngs=rngs)
        self.norm_text = nnx.LayerNorm(d, epsilon=config.eps, rngs=rngs)
        self.text_attention = Attention(config, d, rngs=rngs)
        self.norm_audio = nnx.LayerNorm(d, epsilon=config.eps, rngs=rngs)
        self.audio_attention = Attention(config, config.audio_dim, rngs=rngs, zero_output=True)
        self.mlp = MLP(d, config.mlp_dim, d, rngs=rngs)
        self.eps = config.eps

    def __call__(
        self,
        x: Float[Array, "b f n d"],
        time: Float[Array, "b f 6 d"],
        attend_self: Callable,
        attend_text: Callable | None,
        attend_audio: Callable | None,
    ) -> Float[Array, "b f n d"]:
        """One block over frames of tokens.

        Args:
          time: the shared projection of every frame's timestep, float32.
          attend_self: (q, k, v), each [b, f, n, heads, head dim] before RoPE -> attended values of that shape.
          attend_text, attend_audio: q -> attended values; None leaves the sub-layer out (reference tokens take neither).
        """
        modulation = time + self.modulation[...]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation[:, :, i, None] for i in range(6))
        attention = self.self_attention
        normed = modulated_layer_norm(x, shift_a, scale_a, self.eps)
        x = _gated_sum(x, gate_a, attention.merge(attend_self(*attention.project(normed))))
        if attend_text is not None:
            x = x + self.text_attention.merge(attend_text(self.text_attention.queries(self.norm_text(x))))
        if attend_audio is not None:
            x = x + self.audio_attention.merge(attend_audio(self.audio_attention.queries(self.norm_audio(x))))
        return _gated_sum(x, gate_m, self.mlp(modulated_layer_norm(x, shift_m, scale_m, self.eps)))


def _gated_sum(x: Float[Array, "b f n d"], gate: Float[Array, "b f 1 d"], y: Float[Array, "b f n d"]) -> Float[Array, "b f n d"]:
    return (x + gate * y).astype(x.dtype)


class OutputHead(nnx.Module):
    """LayerNorm modulated by the timestep through its own [2, d] table, then a projection to a token's latents."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        d = config.dim
        self.modulation = nnx.Param(rngs.params.normal((2, d)) / d**0.5)
        self.projection = nnx.Linear(
            d, config.patch**2 * config.latent_channels, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )
        self.eps = config.eps

    def __call__(self, x: Float[Array, "b f n d"], embedding: Float[Array, "b f d"]) -> Float[Array, "b f n p"]:
        shift, scale = jnp.split(embedding[:, :, None] + self.modulation[...], 2, axis=2)
        return self.projection(modulated_layer_norm(x, shift, scale, self.eps))
