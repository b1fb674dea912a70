"""FlashVAE: encoder and streaming decoder.

Every latent frame is exactly `temporal_stride` video frames, the first one too; a still picture is encoded as equal frames.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pikastream_jax.config import FlashVAEConfig
from pikastream_jax.flash_vae.transformer import CausalTransformer, KVCache
from pikastream_jax.flash_vae.upsample import Upsampler
from pikastream_jax.nn.layers import RMSNorm
from pikastream_jax.nn.patch import patchify

# The modules that turn latents into video; the others make latents.
DECODER_PARTS = ("latent_in", "decoder", "upsampler")


class FlashVAE(nnx.Module):
    """Video in [-1, 1] <-> latents (not normalised: see `latents.LatentStatistics`)."""

    def __init__(self, config: FlashVAEConfig, *, impl: str = "auto", rngs: nnx.Rngs):
        """impl: which attention kernels to use, see `pallas_kernels`."""
        self.config = config
        c, stride = config.latent_channels, config.spatial_stride
        self.patch_in = nnx.Linear(config.temporal_stride * stride * stride * 3, config.encoder_dim, rngs=rngs)
        self.encoder = CausalTransformer(
            config.encoder_dim,
            config.encoder_blocks,
            config.encoder_heads,
            config.encoder_kv_heads,
            config.window,
            config.mlp_ratio,
            impl=impl,
            rngs=rngs,
        )
        self.norm_moments = RMSNorm(config.encoder_dim)
        self.moments = nnx.Linear(config.encoder_dim, 2 * c, rngs=rngs)
        self.latent_in = nnx.Linear(c, config.decoder_dim, rngs=rngs)
        self.decoder = CausalTransformer(
            config.decoder_dim,
            config.decoder_blocks,
            config.decoder_heads,
            config.decoder_kv_heads,
            config.window,
            config.mlp_ratio,
            impl=impl,
            rngs=rngs,
        )
        self.upsampler = Upsampler(config, impl=impl, rngs=rngs)

    def encode(self, video: Float[Array, "b t h w 3"]) -> tuple[Float[Array, "b f r c z"], Float[Array, "b f r c z"]]:
        """Mean and log variance of the latents of a whole clip.

        Raises:
          ValueError: t is not a multiple of the temporal stride, or h or w of the spatial stride.
        """
        b, t, h, w, _ = video.shape
        stride = self.config.temporal_stride
        if t % stride:
            raise ValueError(f"flash_vae: {t} video frames are not a multiple of {stride}; repeat the last frame")
        rows, columns = self.config.grid(h, w)
        tokens = self._tokens(video.reshape(b * t // stride, stride, h, w, 3))
        x = self.encoder(tokens.reshape(b, t // stride, rows * columns, -1), rows, columns)
        return self._moments(x, rows, columns)

    def init_encode_cache(self, batch: int, rows: int, columns: int) -> KVCache:
        """The encoder's state at the start of a stream of rows x columns latents."""
        return self.encoder.init_cache(batch, rows * columns)

    def encode_step(
        self, cache: KVCache, frames: Float[Array, "b t h w 3"]
    ) -> tuple[KVCache, tuple[Float[Array, "b r c z"], Float[Array, "b r c z"]]]:
        """The video frames of one latent frame -> mean and log variance, for video that is encoded live."""
        rows, columns = self.config.grid(*frames.shape[2:4])
        x, cache = self.encoder.step(self._tokens(frames), cache, rows, columns)
        return cache, self._moments(x, rows, columns)

    def _tokens(self, frames: Float[Array, "b t h w 3"]) -> Float[Array, "b n d"]:
        """One token per place, from the patches of all frames of a latent frame."""
        b, t = frames.shape[:2]
        patches = patchify(frames.astype(self.patch_in.kernel.dtype), self.config.spatial_stride)
        return self.patch_in(patches.transpose(0, 2, 1, 3).reshape(b, patches.shape[2], t * patches.shape[3]))

    def _moments(self, x: Float[Array, "*b n d"], rows: int, columns: int) -> tuple[Array, Array]:
        moments = self.moments(self.norm_moments(x)).astype(jnp.float32).reshape(*x.shape[:-2], rows, columns, -1)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -20.0, 4.0)

    def decode(self, latents: Float[Array, "b f r c z"]) -> Float[Array, "b t h w 3"]:
        """A whole clip, with the same window as `decode_step`."""
        b, f, rows, columns, _ = latents.shape
        x = self.decoder(self._latent_tokens(latents), rows, columns)
        frames = jax.vmap(lambda x: self.upsampler(x, rows, columns), in_axes=1, out_axes=1)(x)
        return frames.reshape(b, -1, *frames.shape[3:])

    def init_decode_cache(self, batch: int, rows: int, columns: int) -> KVCache:
        """The decoder's state at the start of a stream of rows x columns latents."""
        return self.decoder.init_cache(batch, rows * columns)

    def decode_step(self, cache: KVCache, latent: Float[Array, "b r c z"]) -> tuple[KVCache, Float[Array, "b t h w 3"]]:
        """One latent frame -> its video frames; cost and memory are the same at every frame."""
        rows, columns = latent.shape[1:3]
        x, cache = self.decoder.step(self._latent_tokens(latent), cache, rows, columns)
        return cache, self.upsampler(x, rows, columns)

    def _latent_tokens(self, latents: Float[Array, "*b r c z"]) -> Float[Array, "*b n d"]:
        *batch, rows, columns, z = latents.shape
        return self.latent_in(latents.reshape(*batch, rows * columns, z).astype(self.latent_in.kernel.dtype))
