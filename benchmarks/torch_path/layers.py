"""Layers that both models are built of. Matrix products run in the parameters' dtype; norms and softmax in float32."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.torch_path.cache import LayerCache
from benchmarks.torch_path.rope import Tables, rotate


def attention(
    q: Float[Tensor, "b t h e"], k: Float[Tensor, "b s g e"], v: Float[Tensor, "b s g e"], visible: Tensor | None = None
) -> Float[Tensor, "b t h e"]:
    """Softmax attention; the `h` query heads in groups, one of the `g` key heads each.

    The heads stay behind the tokens in memory: the fused kernels read strided views, so nothing is copied before or after them.

    Args:
      visible: [b, 1, t or 1, s], what a query may see; None means everything.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm with scale and bias, in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class MLP(nn.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, dim_in: int, hidden: int, dim_out: int):
        super().__init__()
        self.up = nn.Linear(dim_in, hidden)
        self.down = nn.Linear(hidden, dim_out)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class GroupedQueryAttention(nn.Module):
    """Projections of grouped-query attention, with RMSNorm of queries and keys per head."""

    def __init__(self, dim: int, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim)
        self.norm_q = RMSNorm(self.head_dim)
        self.norm_k = RMSNorm(self.head_dim)
        self.out = nn.Linear(dim, dim)

    def project(self, x: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, n, heads, head dim], keys and values [b, n, kv heads, head dim], before RoPE."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        return self.norm_q(q), self.norm_k(k), v


class Block(nn.Module):
    """Pre-norm attention inside each row of the batch, and an MLP."""

    def __init__(self, dim: int, heads: int, kv_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm_attention = RMSNorm(dim)
        self.attention = GroupedQueryAttention(dim, heads, kv_heads)
        self.norm_mlp = RMSNorm(dim)
        self.mlp = MLP(dim, round(dim * mlp_ratio), dim)

    def finish(self, x: Float[Tensor, "b n d"], attended: Float[Tensor, "b n h e"]) -> Float[Tensor, "b n d"]:
        x = x + self.attention.out(attended.flatten(-2))
        return x + self.mlp(self.norm_mlp(x))

    def forward(
        self, x: Float[Tensor, "b n d"], tables: Tables | None = None, valid: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Args:
        tables: turn queries and keys; None for no positions.
        valid: how many of a row's keys count; None means all.
        """
        q, k, v = self.attention.project(self.norm_attention(x))
        if tables is not None:
            q, k = rotate(q, tables), rotate(k, tables)
        visible = None if valid is None else (torch.arange(x.shape[1], device=x.device) < valid[:, None])[:, None, None]
        return self.finish(x, attention(q, k, v, visible))


class RollingBlock(Block):
    """The same block, one latent frame at a time, with the frames before it in a rolling cache."""

    def forward(self, x: Float[Tensor, "b n d"], here: Tables, cache: LayerCache) -> Float[Tensor, "b n d"]:
        q, k, v = self.attention.project(self.norm_attention(x))
        keys, values = cache.write(k, rotate(k, here), v)
        return self.finish(x, attention(rotate(q, here), keys, values))
