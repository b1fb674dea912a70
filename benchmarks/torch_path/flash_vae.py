"""FlashVAE, one latent frame at a time: encoder step, decoder step, upsampler."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.torch_path.cache import RollingCache
from benchmarks.torch_path.layers import MLP, Block, RMSNorm, RollingBlock
from benchmarks.torch_path.rope import Rope, Tables, patchify, unpatchify
from pikastream_jax.config import FlashVAEConfig


class CausalTransformer(nn.Module):
    """Blocks over latent frames; a frame sees itself and the `window` frames before it."""

    def __init__(self, dim: int, blocks: int, heads: int, kv_heads: int, window: int, mlp_ratio: float):
        super().__init__()
        self.window, self.kv_heads, self.head_dim = window, kv_heads, dim // heads
        self.blocks = nn.ModuleList([RollingBlock(dim, heads, kv_heads, mlp_ratio) for _ in range(blocks)])

    def init_cache(self, batch: int, rows: int, columns: int, device: torch.device | str, dtype: torch.dtype) -> RollingCache:
        """The start of a stream."""
        return RollingCache(
            Rope(self.head_dim, rows, columns, device),
            layers=len(self.blocks),
            batch=batch,
            heads=self.kv_heads,
            head_dim=self.head_dim,
            chunk=1,
            window=self.window,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Float[Tensor, "b n d"], cache: RollingCache) -> Float[Tensor, "b n d"]:
        """One latent frame, for which `cache.place` was called."""
        cache.turn()
        for index, block in enumerate(self.blocks):
            x = block(x, cache.here, cache.layer(index))
        return x


class Upsampler(nn.Module):
    """Tokens of one latent frame -> its video frames: time first, then space."""

    def __init__(self, config: FlashVAEConfig):
        super().__init__()
        self.config = config
        dim = config.refine_dim
        self.expand = nn.Linear(config.decoder_dim, config.temporal_stride * dim)
        self.blocks = nn.ModuleList(
            [Block(dim, config.refine_heads, config.refine_heads, config.mlp_ratio) for _ in range(config.refine_blocks)]
        )
        self.norm = RMSNorm(dim)
        self.head = MLP(dim, config.head_hidden, 3 * config.spatial_stride**2)

    def tables(self, rows: int, columns: int, device: torch.device | str) -> list[Tables]:
        """Every block's RoPE tables [w, n, 1, e], window by window; the same for all frames.

        Raises:
          ValueError: windows do not tile the grid.
        """
        config = self.config
        size = config.refine_window
        if size and (rows % size or columns % size):
            raise ValueError(f"refine_window {size} does not divide {rows}x{columns} latents; choose a divisor of both, or 0")
        times = torch.arange(float(config.temporal_stride), device=device)
        tables = Rope(config.refine_dim // config.refine_heads, rows, columns, device).tables(times)
        places = [part[:, 0].unflatten(0, (1, config.temporal_stride, rows, columns)) for part in tables]
        return [tuple(self._group(part, index)[:, :, None] for part in places) for index in range(config.refine_blocks)]

    def forward(self, x: Float[Tensor, "b n d"], tables: list[Tables], rows: int, columns: int) -> Float[Tensor, "b t h w 3"]:
        """Args: tables: see `tables`."""
        config, b = self.config, x.shape[0]
        x = self.expand(x).unflatten(-1, (config.temporal_stride, -1)).transpose(1, 2).unflatten(2, (rows, columns))
        for index, (block, table) in enumerate(zip(self.blocks, tables, strict=True)):
            shape = x.shape
            grouped = self._group(x, index).unflatten(0, (b, -1))  # [b, windows, n, d]: tables are the same for all rows
            table = tuple(part.expand(b, *part.shape).flatten(0, 1) for part in table)
            x = self._ungroup(block(grouped.flatten(0, 1), table), index, shape)
        pixels = self.head(self.norm(x.flatten(2, 3)))
        return unpatchify(pixels, config.spatial_stride, rows, columns)

    def _shift(self, index: int) -> int:
        return self.config.refine_window // 2 if index % 2 else 0

    def _group(self, x: Float[Tensor, "b t r c d"], index: int) -> Float[Tensor, "bw n d"]:
        """Block `index`'s windows over rows, columns and all time steps, rolled by half a window in every other block."""
        size, shift = self.config.refine_window, self._shift(index)
        if not size:
            return x.flatten(1, 3)
        if shift:
            x = x.roll((-shift, -shift), (2, 3))
        b, t, r, c, d = x.shape
        x = x.reshape(b, t, r // size, size, c // size, size, d).permute(0, 2, 4, 1, 3, 5, 6)
        return x.reshape(-1, t * size * size, d)

    def _ungroup(self, x: Float[Tensor, "bw n d"], index: int, shape: torch.Size) -> Float[Tensor, "b t r c d"]:
        """The inverse of `_group`."""
        size, shift = self.config.refine_window, self._shift(index)
        if not size:
            return x.reshape(shape)
        b, t, r, c, d = shape
        x = x.reshape(b, r // size, c // size, t, size, size, d).permute(0, 3, 1, 4, 2, 5, 6).reshape(shape)
        return x.roll((shift, shift), (2, 3)) if shift else x


class FlashVAE(nn.Module):
    """Video in [-1, 1] <-> latents (not normalised)."""

    def __init__(self, config: FlashVAEConfig):
        super().__init__()
        self.config = config
        channels, stride = config.latent_channels, config.spatial_stride
        self.patch_in = nn.Linear(config.temporal_stride * stride * stride * 3, config.encoder_dim)
        self.encoder = CausalTransformer(
            config.encoder_dim,
            config.encoder_blocks,
            config.encoder_heads,
            config.encoder_kv_heads,
            config.window,
            config.mlp_ratio,
        )
        self.norm_moments = RMSNorm(config.encoder_dim)
        self.moments = nn.Linear(config.encoder_dim, 2 * channels)
        self.latent_in = nn.Linear(channels, config.decoder_dim)
        self.decoder = CausalTransformer(
            config.decoder_dim,
            config.decoder_blocks,
            config.decoder_heads,
            config.decoder_kv_heads,
            config.window,
            config.mlp_ratio,
        )
        self.upsampler = Upsampler(config)

    def encode_step(
        self, cache: RollingCache, frames: Float[Tensor, "b t h w 3"]
    ) -> tuple[Float[Tensor, "b r c z"], Float[Tensor, "b r c z"]]:
        """The video frames of one latent frame -> mean and log variance."""
        rows, columns = self.config.grid(*frames.shape[2:4])
        patches = patchify(frames.to(self.patch_in.weight.dtype), self.config.spatial_stride)
        x = self.encoder(self.patch_in(patches.transpose(1, 2).flatten(2)), cache)
        moments = self.moments(self.norm_moments(x)).unflatten(1, (rows, columns))
        mean, log_variance = moments.chunk(2, dim=-1)
        return mean, log_variance.clamp(-20.0, 4.0)

    def decode_step(self, cache: RollingCache, latent: Float[Tensor, "b r c z"], tables: list[Tables]) -> Float[Tensor, "b t h w 3"]:
        """One latent frame -> its video frames.

        Args:
          tables: `upsampler.tables` of this grid.
        """
        rows, columns = latent.shape[1:3]
        x = self.latent_in(latent.to(self.latent_in.weight.dtype).flatten(1, 2))
        return self.upsampler(self.decoder(x, cache), tables, rows, columns)
