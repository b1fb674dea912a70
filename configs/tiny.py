"""The shipped preset: 256x256 at 25 FPS, faster than real time on two CPU cores."""

from pikastream_jax.config import Config


def tiny() -> Config:
    """About 14 M parameters: DiT 8.5 M, FlashVAE 4.8 M, text and audio encoders 0.6 M."""
    return Config(name="tiny")
