"""Prompt -> tokens."""

from pikastream_jax.text.encoder import TextEncoder
from pikastream_jax.text.tokenizer import Tokenizer

__all__ = ["TextEncoder", "Tokenizer"]
