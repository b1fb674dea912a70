"""The size of the public streaming students (Wan 2.1 1.3B and what was distilled from it), to compare speed like for like."""

from configs.pikastream_9b import flash_vae_480p
from pikastream_jax.config import AudioConfig, Config, DiTConfig, StreamConfig, TextConfig


def base_1_3b() -> Config:
    """1560 tokens to a latent frame, as behind Wan 2.1's VAE of stride 8 with 2x2 patches: here FlashVAE's stride 16, every latent a token.

    `preset("base_1_3b", window=6)` for the short window.
    """
    return Config(
        name="base_1_3b",
        audio=AudioConfig(hop=120, mel_frames=128, tokens=32, dim=768, blocks=4, heads=12),
        text=TextConfig(length=512, vocabulary=32_768, dim=1024, blocks=6, heads=16),
        flash_vae=flash_vae_480p(),
        dit=DiTConfig(dim=1536, heads=12, blocks=30, mlp_dim=8960, patch=1, latent_channels=48, text_dim=1024, audio_dim=768),
        stream=StreamConfig(
            fps=16, height=480, width=832, chunk=3, window=18, steps=4, shift=5.0, precision="bfloat16", unroll_steps=True
        ),
    )
