"""Latent tokens to video frames: time first, then space.

Temporal-first upsampling (FlashDecoder): a channel expansion is read as `temporal_stride` time steps, a small Transformer refines
across them, then an MLP and a pixel shuffle give the pixels.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import frame_attention
from pikastream_jax.config import FlashVAEConfig
from pikastream_jax.nn.attention import Block
from pikastream_jax.nn.layers import MLP, RMSNorm
from pikastream_jax.nn.patch import unpatchify
from pikastream_jax.nn.rope import grid_positions, rope_tables, rotate


def _windows(x: Float[Array, "b t r c d"], size: int, shift: int) -> Float[Array, "b w n d"]:
    """Cuts rows and columns into size x size windows over all time steps, the picture rolled by `shift` first."""
    b, t, r, c, d = x.shape
    x = jnp.roll(x, (-shift, -shift), axis=(2, 3)) if shift else x
    x = x.reshape(b, t, r // size, size, c // size, size, d).transpose(0, 2, 4, 1, 3, 5, 6)
    return x.reshape(b, (r // size) * (c // size), t * size * size, d)


def _unwindows(x: Float[Array, "b w n d"], size: int, shift: int, t: int, r: int, c: int) -> Float[Array, "b t r c d"]:
    """The inverse of `_windows`."""
    b, d = x.shape[0], x.shape[-1]
    x = x.reshape(b, r // size, c // size, t, size, size, d).transpose(0, 3, 1, 4, 2, 5, 6).reshape(b, t, r, c, d)
    return jnp.roll(x, (shift, shift), axis=(2, 3)) if shift else x


class Upsampler(nnx.Module):
    """Tokens of one latent frame -> its video frames."""

    def __init__(self, config: FlashVAEConfig, *, impl: str = "auto", rngs: nnx.Rngs):
        self.config, self.impl = config, impl
        dim, t = config.refine_dim, config.temporal_stride
        self.expand = nnx.Linear(config.decoder_dim, t * dim, rngs=rngs)
        self.blocks = nnx.List(
            [Block(dim, config.refine_heads, config.refine_heads, config.mlp_ratio, rngs=rngs) for _ in range(config.refine_blocks)]
        )
        self.norm = RMSNorm(dim)
        self.head = MLP(dim, config.head_hidden, 3 * config.spatial_stride**2, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], rows: int, columns: int) -> Float[Array, "b t h w 3"]:
        config, b = self.config, x.shape[0]
        t, dim = config.temporal_stride, config.refine_dim
        size = config.refine_window
        if size and (rows % size or columns % size):
            raise ValueError(
                f"flash_vae: {rows}x{columns} latents are not a multiple of refine_window {size}; set it to a divisor, or to 0 for the whole picture"
            )
        x = self.expand(x).reshape(b, rows, columns, t, dim).transpose(0, 3, 1, 2, 4)
        places = jnp.stack(grid_positions(jnp.arange(t, dtype=jnp.float32), rows, columns), axis=-1)
        places = places.reshape(1, t, rows, columns, 3)
        for index, block in enumerate(self.blocks):
            # Every other block shifts its windows by half, so that their borders move; what wraps around the edge is far
            # away by its RoPE position.
            shift = size // 2 if index % 2 else 0
            if size:
                grouped, place = _windows(x, size, shift), _windows(places, size, shift)
            else:
                grouped, place = x.reshape(b, 1, -1, dim), places.reshape(1, 1, -1, 3)
            tables = rope_tables(place[..., 0], place[..., 1], place[..., 2], dim // config.refine_heads)

            def attend(q, k, v, tables=tables):
                return frame_attention(rotate(q, tables), rotate(k, tables), v, impl=self.impl)

            grouped = block(grouped, attend)
            x = _unwindows(grouped, size, shift, t, rows, columns) if size else grouped.reshape(b, t, rows, columns, dim)
        pixels = self.head(self.norm(x)).astype(jnp.float32).reshape(b, t, rows * columns, -1)
        return unpatchify(pixels, config.spatial_stride, rows, columns)
