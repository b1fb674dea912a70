"""Too small to ship, large enough to show what every stage of the recipe does within an hour or two on two CPU cores."""

from pathlib import Path
from typing import Any

from pikastream_jax.config import AudioConfig, Config, DiTConfig, TextConfig


def nano() -> Config:
    """FlashVAE of `tiny`, whose weights it starts from; narrower models around it."""
    return Config(
        name="nano",
        audio=AudioConfig(dim=64, blocks=2, heads=2),
        text=TextConfig(dim=64, heads=2),
        dit=DiTConfig(dim=128, heads=4, blocks=5, mlp_dim=384, frequency_dim=128, text_dim=64, audio_dim=64),
    )


# Within the minutes of this preset no FlashVAE learns from nothing to draw a face whose lips can be followed: one for 128x128 pixels was
# tried, and of true clips that had passed through it after 40 minutes an estimator read the lips with r = 0.48.
INIT: dict[str, dict[str, Path]] = {
    "vae_low_res": {"flash_vae": Path(__file__).parent.parent / "pikastream_jax" / "assets" / "tiny.safetensors"},
}

# A reader of pixels is worth its minutes where the decoder learns from nothing; here it starts from one that had such a reader.
LEFT_OUT = ("face_reader",)

# What differs from the stages' own settings.
SETTINGS: dict[str, dict[str, Any]] = {
    "vae_low_res": {"updates": 40, "optimiser": {"learning_rate": 1e-3, "warmup_steps": 10}},
    "vae_streaming": {"updates": 40, "optimiser": {"learning_rate": 5e-4, "warmup_steps": 10}},
    "vae_adversarial": {"updates": 120, "batch": 4, "alone": 30, "optimiser": {"warmup_steps": 10}},
    "vae_conv3d": {"updates": 300, "batch": 6, "ema": 0.99, "optimiser": {"warmup_steps": 50}},
    "clips": {"count": 600, "held_out": 100, "shard": 50},
    "audio_pretrain": {"updates": 700},
    "text_pretrain": {"updates": 300},
    "latent_reader": {"updates": 600},
    "dit_pretrain": {"updates": 1_000},
    "dit_sft": {"updates": 200},
    "reward_identity": {"updates": 500},
    "reward_lip_sync": {"updates": 300},
    "reward_motion": {"updates": 120, "batch": 8, "latent_frames": 8},
    "reward_artifact": {"updates": 450},
    "dit_reward": {"updates": 40, "batch": 2},
    "ode_pairs": {"count": 160, "held_out": 24, "steps": 12},
    "dit_causal": {"updates": 300, "batch": 4},
    "dit_self_forcing": {"updates": 50, "batch": 3, "critic_updates": 3, "data": 0.3},
    "dit_student_reward": {"updates": 40, "batch": 2},
}

# What a step of the recipe has of its own beside that: half the sequences of an update in the sequential schedule, which then takes as long.
FLAGS = {"dit_causal_rolling": ("--batch", "2")}
