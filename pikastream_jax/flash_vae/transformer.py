"""The causal windowed Transformer that encoder and decoder share, over whole clips or frame by frame.

Source of the structure: FlashDecoder (Kang and Kwak, CVPR 2026): grouped-query attention, 3D RoPE, a rolling window of keys and
values, causality from the order of processing instead of masks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import chunked_attention, ring_attention
from pikastream_jax.nn.attention import Block
from pikastream_jax.nn.ring import ring_ages, write_rows
from pikastream_jax.nn.rope import grid_positions, rope_tables, rotate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the last W latent frames. Its size never changes; zeros and count 0 are the start of a stream."""

    k: Float[Array, "layers b slots g d"]  # slots = W x tokens per latent frame; keys before RoPE
    v: Float[Array, "layers b slots g d"]
    count: Int[Array, "b"]  # latent frames seen

    def ring_valid(self, tokens: int) -> Int[Array, "b"]:
        """Slots that hold a key."""
        return jnp.minimum(self.count, self.k.shape[2] // tokens) * tokens  # in this order: a long stream's count times tokens would overflow


class CausalTransformer(nnx.Module):
    """Blocks over latent frames; a frame sees itself and the `window` frames before it."""

    def __init__(
        self, dim: int, blocks: int, heads: int, kv_heads: int, window: int, mlp_ratio: float, *, impl: str = "auto", rngs: nnx.Rngs
    ):
        self.window, self.kv_heads, self.head_dim, self.impl = window, kv_heads, dim // heads, impl
        self.blocks = nnx.List([Block(dim, heads, kv_heads, mlp_ratio, rngs=rngs) for _ in range(blocks)])

    def init_cache(self, batch: int, tokens: int) -> KVCache:
        """The start of a stream, in the dtype of the weights, as keys and values will be. `tokens` is tokens per latent frame."""
        dtype = self.blocks[0].attention.qkv.kernel.dtype
        shape = (len(self.blocks), batch, self.window * tokens, self.kv_heads, self.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    def __call__(self, x: Float[Array, "b f n d"], rows: int, columns: int) -> Float[Array, "b f n d"]:
        """A whole clip at once."""
        b, f, n, d = x.shape
        places = grid_positions(jnp.arange(f, dtype=jnp.float32), rows, columns)
        tables = rope_tables(*places, self.head_dim)
        each_its_own = jnp.broadcast_to(jnp.arange(f), (b, f))

        def attend(q, k, v):
            return chunked_attention(
                rotate(q, tables), rotate(k, tables), v, chunk_ids=each_its_own, window=self.window, impl=self.impl
            )

        x = x.reshape(b, f * n, d)
        for block in self.blocks:
            x = block(x, attend)
        return x.reshape(b, f, n, d)

    def step(self, x: Float[Array, "b n d"], cache: KVCache, rows: int, columns: int) -> tuple[Float[Array, "b n d"], KVCache]:
        """One latent frame, with the window from the cache."""
        n = x.shape[1]
        here = rope_tables(*grid_positions(jnp.zeros(1), rows, columns), self.head_dim)
        ages = ring_ages(cache.count, self.window).astype(jnp.float32)
        past = rope_tables(*grid_positions(-ages, rows, columns), self.head_dim)
        rotated = rotate(cache.k, past)  # every layer at once
        nothing_fixed = jnp.zeros_like(cache.count)
        new_k, new_v = [], []
        for layer, block in enumerate(self.blocks):

            def attend(q, k, v, layer=layer):
                new_k.append(k)
                new_v.append(v)
                return ring_attention(
                    rotate(q, here),
                    rotate(k, here),
                    v,
                    rotated,
                    cache.v,
                    layer=layer,
                    fixed_slots=0,
                    fixed_valid=nothing_fixed,
                    ring_valid=cache.ring_valid(n),
                    impl=self.impl,
                )

            x = block(x, attend)
        oldest = cache.count % self.window * n
        return x, KVCache(
            write_rows(cache.k, jnp.stack(new_k), oldest), write_rows(cache.v, jnp.stack(new_v), oldest), cache.count + 1
        )
