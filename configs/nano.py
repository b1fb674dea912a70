"""Too small to ship, large enough to show what every stage of the recipe does within an hour or two on two CPU cores."""

from typing import Any

from pikastream_jax.config import AudioConfig, Config, DiTConfig, FlashVAEConfig, StreamConfig, TextConfig


def nano() -> Config:
    """128x128 pixels: as many latents and tokens as in `tiny`, each of half the side, in narrower models."""
    return Config(
        name="nano",
        audio=AudioConfig(dim=64, blocks=2, heads=2),
        text=TextConfig(dim=64, heads=2),
        flash_vae=FlashVAEConfig(
            latent_channels=12,
            spatial_stride=8,
            encoder_dim=96,
            encoder_blocks=3,
            encoder_heads=3,
            encoder_kv_heads=1,
            decoder_dim=128,
            decoder_blocks=3,
            decoder_heads=4,
            decoder_kv_heads=1,
            refine_dim=64,
            refine_blocks=2,
            refine_heads=2,
            head_hidden=128,
        ),
        dit=DiTConfig(
            dim=128, heads=4, blocks=5, mlp_dim=384, latent_channels=12, frequency_dim=128, text_dim=64, audio_dim=64
        ),
        stream=StreamConfig(height=128, width=128),
    )


# What differs from the stages' own settings, which are those of `tiny`.
SETTINGS: dict[str, dict[str, Any]] = {
    "vae_low_res": {"updates": 1_100, "batch": 16, "crop": 64},
    "vae_streaming": {"updates": 300, "crop": 128, "ema": 0.99, "optimiser": {"learning_rate": 2e-3}},
    "vae_adversarial": {
        "updates": 400,
        "batch": 4,
        "latent_frames": 2,
        "crop": 64,
        "ema": 0.99,
        "alone": 50,
        "discriminator_dim": 16,
        "optimiser": {"warmup_steps": 20},
    },
    "vae_conv3d": {"updates": 300, "batch": 6, "crop": 64, "ema": 0.99, "optimiser": {"warmup_steps": 50}},
    "audio_pretrain": {"updates": 700},
    "text_pretrain": {"updates": 300},
    "latent_reader": {"updates": 600},
    "dit_pretrain": {"updates": 1_000},
    "dit_sft": {"updates": 300},
    "dit_reward": {"updates": 60, "batch": 2},
    "ode_pairs": {"count": 240, "held_out": 24, "steps": 16},
    "dit_causal": {"updates": 300},
    "dit_self_forcing": {"updates": 120, "batch": 4},
    "dit_student_reward": {"updates": 50, "batch": 2},
}
