"""The plain pre-norm Transformer block that FlashVAE and the audio and text encoders are built of."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.nn.layers import MLP, RMSNorm


class GroupedQueryAttention(nnx.Module):
    """Projections of grouped-query attention, with RMSNorm of queries and keys per head."""

    def __init__(self, dim: int, heads: int, kv_heads: int, *, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.qkv = nnx.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, rngs=rngs)
        self.norm_q = RMSNorm(self.head_dim)
        self.norm_k = RMSNorm(self.head_dim)
        self.out = nnx.Linear(dim, dim, rngs=rngs)

    def project(self, x: Float[Array, "*b n d"]) -> tuple[Array, Array, Array]:
        """Queries [*b, n, heads, head dim], keys and values [*b, n, kv heads, head dim], before RoPE."""
        qkv = self.qkv(x).reshape(*x.shape[:-1], -1, self.head_dim)
        q, k, v = jnp.split(qkv, [self.heads, self.heads + self.kv_heads], axis=-2)
        return self.norm_q(q), self.norm_k(k), v

    def merge(self, attended: Float[Array, "*b n h d"]) -> Float[Array, "*b n d"]:
        return self.out(attended.reshape(*attended.shape[:-2], -1))


class Block(nnx.Module):
    """Pre-norm attention and MLP; the attention itself is given by the caller."""

    def __init__(self, dim: int, heads: int, kv_heads: int, mlp_ratio: float, *, rngs: nnx.Rngs):
        self.norm_attention = RMSNorm(dim)
        self.attention = GroupedQueryAttention(dim, heads, kv_heads, rngs=rngs)
        self.norm_mlp = RMSNorm(dim)
        self.mlp = MLP(dim, round(dim * mlp_ratio), dim, rngs=rngs)

    def __call__(self, x: Float[Array, "*b n d"], attend) -> Float[Array, "*b n d"]:
        """`attend(q, k, v)` returns the attended values of shape of q."""
        x = x + self.attention.merge(attend(*self.attention.project(self.norm_attention(x))))
        return x + self.mlp(self.norm_mlp(x))
