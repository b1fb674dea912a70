"""The shipped preset: 256x256 at 25 FPS, streams faster than real time on two CPU cores; its training is laid out for a GPU."""

from typing import Any

from pikastream_jax.config import Config


def tiny() -> Config:
    """About 14 M parameters: DiT 8.5 M, FlashVAE 4.8 M, text and audio encoders 0.6 M."""
    return Config(name="tiny")


_REWARDS = {"identity": 1.5, "lip_sync": 1.5, "motion": 0.5, "artifact": 0.5}

# What differs from the stages' own settings: sizes meant for a quarter of an hour of one GPU. Two CPU cores would take days.
SETTINGS: dict[str, dict[str, Any]] = {
    "vae_low_res": {"updates": 3_500},
    "face_estimator": {"updates": 700},
    "audio_pretrain": {"updates": 1_000, "batch": 256},
    "vae_streaming": {"updates": 500, "batch": 6},
    "vae_adversarial": {"updates": 1_200, "batch": 12},
    "clips": {"count": 7_168, "shard": 256},
    "latent_reader": {"updates": 900, "batch": 64},
    "dit_pretrain": {"updates": 3_600, "batch": 32},
    "dit_sft": {"updates": 500, "batch": 32, "optimiser": {"learning_rate": 5e-4}},
    "reward_identity": {"updates": 1_200, "batch": 32, "people": 4_096},
    "reward_lip_sync": {"updates": 1_000, "batch": 32, "clips": 768},
    "reward_motion": {"updates": 100, "batch": 24, "clips": 512},
    "reward_artifact": {"updates": 1_000, "batch": 16, "clips": 2_048},
    "dit_reward": {"updates": 160, "batch": 8, "weights": _REWARDS, "data": 2.0},
    "ode_pairs": {"count": 1_920, "steps": 12, "text": 2.5, "audio": 1.5, "reference": 1.7, "batch": 64, "shard": 256},
    "dit_causal": {"updates": 1_200, "batch": 12},
    "dit_self_forcing": {"updates": 300, "batch": 12, "critic_updates": 4, "data": 0.3},
    "dit_student_reward": {"updates": 160, "batch": 8, "weights": _REWARDS, "data": 2.5},
}

# What a step of the recipe has of its own beside that: half the sequences of an update in the sequential schedule, which then takes as long.
FLAGS = {"dit_causal_rolling": ("--batch", "6")}
