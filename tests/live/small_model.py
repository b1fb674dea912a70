"""A real model, small enough for three of them on two cores: 48x32 pixels, random weights."""

from pikastream_jax.live.model import StreamModel
from pikastream_jax.streaming.generator import Generator
from pikastream_jax.streaming.package import Package
from pikastream_jax.text import Tokenizer
from tests.small import small_config, small_models


def build() -> StreamModel:
    config = small_config()
    words = Tokenizer.learn(["a person smiling"], config.text.vocabulary, config.text.length)
    return StreamModel(Generator(Package(*small_models(config), words, {})))
