"""Log-mel slices -> audio tokens.

Every latent frame has a slice of sound of its own that ends where the frame ends (plus the configured look-ahead), and the encoder
sees nothing else. So streaming and offline are the same computation, and no later sound can reach a frame (the recipe of
SekoTalk's causal audio adapter, LightX2V).
"""

import functools

from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import frame_attention
from pikastream_jax.audio.mel import log_mel
from pikastream_jax.config import AudioConfig
from pikastream_jax.nn.attention import Block
from pikastream_jax.nn.layers import RMSNorm

MEL_FRAMES_PER_TOKEN = 4


class AudioEncoder(nnx.Module):
    """A slice of sound -> its tokens."""

    def __init__(self, config: AudioConfig, *, impl: str = "auto", rngs: nnx.Rngs):
        self.config, self.impl = config, impl
        self.patch_in = nnx.Linear(MEL_FRAMES_PER_TOKEN * config.mels, config.dim, rngs=rngs)
        self.position_table = nnx.Param(0.02 * rngs.params.normal((config.tokens, config.dim)))
        self.blocks = nnx.List([Block(config.dim, config.heads, config.heads, 3.0, rngs=rngs) for _ in range(config.blocks)])
        self.norm_out = RMSNorm(config.dim)

    def __call__(self, mel: Float[Array, "*b m k"]) -> Float[Array, "*b a d"]:
        """Tokens, oldest first.

        Args:
          mel: normalised log-mel of whole slices, m = mel_frames.
        """
        *batch, m, k = mel.shape
        x = mel.reshape(-1, m // MEL_FRAMES_PER_TOKEN, MEL_FRAMES_PER_TOKEN * k)
        x = self.patch_in(x.astype(self.patch_in.kernel.dtype)) + self.position_table[...]
        x = x[:, None]  # one group to a slice
        for block in self.blocks:
            x = block(x, functools.partial(frame_attention, impl=self.impl))
        return self.norm_out(x).reshape(*batch, -1, self.config.dim)

    def from_samples(self, slices: Float[Array, "*b n"]) -> Float[Array, "*b a d"]:
        """Tokens of slices of `context_samples` samples."""
        return self(log_mel(slices, self.config))
