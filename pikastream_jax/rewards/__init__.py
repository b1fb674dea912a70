"""Reward models: small differentiable networks that say how good a shown clip is, higher is better."""

from pikastream_jax.rewards.scoring import REWARDS, Rewards
from pikastream_jax.rewards.shown import SIDE, Shown, canonical

__all__ = ["REWARDS", "SIDE", "Rewards", "Shown", "canonical"]
