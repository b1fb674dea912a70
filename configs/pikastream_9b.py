"""The published system's size: a 9B DiT and FlashVAE at 480p, for one 80 GB GPU. No weights of it exist yet; it is here to be measured."""

from pikastream_jax.config import AudioConfig, Config, DiTConfig, FlashVAEConfig, StreamConfig, TextConfig


def flash_vae_480p() -> FlashVAEConfig:
    """FlashVAE at full size: its decoder takes 1.17 TFLOP for a latent frame of 480x832 pixels, refinement over the whole latent frame."""
    return FlashVAEConfig(
        latent_channels=48,
        encoder_dim=1024,
        encoder_blocks=8,
        encoder_heads=16,
        encoder_kv_heads=4,
        decoder_dim=1024,
        decoder_blocks=12,
        decoder_heads=16,
        decoder_kv_heads=4,
        refine_dim=512,
        refine_blocks=4,
        refine_heads=8,
        refine_window=0,
        head_hidden=1024,
    )


def pikastream_9b() -> Config:
    """390 tokens to a latent frame. 24 FPS at 480x832; `preset("pikastream_9b", fps=30, height=832, width=480)` for the others."""
    return Config(
        name="pikastream_9b",
        audio=AudioConfig(hop=120, mel_frames=128, tokens=32, dim=768, blocks=4, heads=12),
        text=TextConfig(length=128, vocabulary=32_768, dim=1024, blocks=6, heads=16),
        flash_vae=flash_vae_480p(),
        dit=DiTConfig(
            dim=4096, heads=32, blocks=30, mlp_dim=15_360, latent_channels=48, text_dim=1024, audio_dim=768, frequency_dim=256
        ),
        stream=StreamConfig(
            fps=24,
            height=480,
            width=832,
            chunk=3,
            window=12,
            steps=4,
            shift=5.0,
            precision="bfloat16",
            unroll_steps=True,
        ),
    )

