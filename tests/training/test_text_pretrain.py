"""Pre-training of the text encoder: that prompts come to mean what they say, and that the DiT's stage starts from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.config import TextConfig
from pikastream_jax.data.captions import caption_batch
from pikastream_jax.nn.layers import functional, initial_params
from pikastream_jax.text import Tokenizer
from pikastream_jax.training import dit_pretrain, text_pretrain
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.loop import run
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.weights import safetensors_io
from tests.small import small_config, small_models

SMALL = small_config()
CONFIG = dataclasses.replace(
    SMALL,
    text=TextConfig(length=24, vocabulary=512, dim=64, blocks=1, heads=2),
    dit=dataclasses.replace(SMALL.dit, text_dim=64),
)
SETTINGS = text_pretrain.Settings(
    updates=200, batch=128, captions=3_000, held_out=100, optimiser=OptimiserConfig(6e-3, warmup_steps=5)
)
HAPPY = text_pretrain.STYLE.index("happy")


@pytest.fixture
def tokenizer(monkeypatch):
    words = Tokenizer.learn(caption_batch(0, 500)[0], CONFIG.text.vocabulary, CONFIG.text.length)
    monkeypatch.setattr(text_pretrain, "load_clip_record", lambda path, length: (words, None))
    return words


def test_it_understands_prompts_and_the_dit_starts_from_it(tokenizer, tmp_path):
    stage = text_pretrain.build(CONFIG, 0, {"clips": tmp_path}, SETTINGS)
    before = stage.evaluate(stage.init(), stage.data())
    state = run(stage, tmp_path / "run")
    after = stage.evaluate(state, stage.data())
    assert before["understood"] < 0.6 < 0.9 <= after["understood"]
    assert after["loss"] < 0.8 * before["loss"]

    model = functional(lambda rngs: text_pretrain.StyleReadout(CONFIG, rngs=rngs))
    prompts = ["a man with a big smile", "a sad woman", ""]
    happy = model.bind(state.ema)(*tokenizer.encode_batch(prompts))[:, HAPPY]
    assert happy[0] > 0.5 and happy[1] < 0.15
    assert 0.05 < happy[2] < 0.35, "nothing said: the mean over all people"

    audio = tmp_path / "audio.safetensors"
    safetensors_io.save(audio, {"audio": small_models(CONFIG)[1].denoiser["audio"]}, dtype=jnp.float32)
    pretrain = dit_pretrain.build(CONFIG, 0, {"audio": audio, "text": tmp_path / "run"}, dit_pretrain.Settings())
    jax.tree.map(np.testing.assert_array_equal, pretrain.init().params["text"], load_weights(tmp_path / "run")["text"])


def test_padding_is_not_read():
    def build(rngs):
        return text_pretrain.StyleReadout(CONFIG, rngs=rngs)

    readout = functional(build).bind(initial_params(build, jax.random.key(0)))
    tokens = jnp.arange(24)[None] + 3
    other = tokens.at[:, 5:].add(7)
    valid = jnp.array([5])
    np.testing.assert_array_equal(readout(tokens, valid), readout(other, valid))
    assert jnp.abs(readout(tokens, valid) - readout(tokens, valid + 1)).max() > 1e-3
