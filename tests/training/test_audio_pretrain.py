"""Pre-training of the audio encoder: that it learns what the sound says, and that the DiT's stage starts from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_corpus import small_corpus

from pikastream_jax.data.corpus import MEL_FRAMES, TRACKS, VIDEO_FRAMES, save_corpus
from pikastream_jax.training import audio_pretrain, dit_pretrain
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.loop import run
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.weights import safetensors_io
from tests.small import small_config, small_models

CONFIG = small_config()


SETTINGS = audio_pretrain.Settings(updates=200, batch=32, optimiser=OptimiserConfig(5e-3, warmup_steps=5))


@pytest.fixture
def corpus_file(tmp_path, monkeypatch):
    """A corpus in which the sound's level tells the mouth's opening, and nothing tells the other tracks."""
    stop = np.array([1000, 1010, 1100])  # latent frames
    frames = stop[-1] * VIDEO_FRAMES
    rng = np.random.default_rng(0)
    level = rng.choice([5, *range(20, 110)], stop[-1], p=[0.3, *[0.7 / 90] * 90]).repeat(VIDEO_FRAMES).astype(np.uint8)
    tracks = rng.integers(0, 256, (frames, len(TRACKS)), np.uint8)
    tracks[:, 0] = level * 2
    mel = np.repeat(level, MEL_FRAMES // VIDEO_FRAMES)[:, None].repeat(16, axis=1)
    path = tmp_path / "speech.npz"
    save_corpus(path, dataclasses.replace(small_corpus(), mel=mel, tracks=tracks, start=np.array([0, 1000, 1010]), stop=stop))
    monkeypatch.setattr(audio_pretrain, "SPEECH", path)
    monkeypatch.setattr(audio_pretrain, "augment", lambda mel, key, config: mel)
    return path


def test_it_hears_what_can_be_heard_and_the_dit_starts_from_it(corpus_file, tmp_path):
    stage = audio_pretrain.build(CONFIG, 0, {}, SETTINGS)
    state = run(stage, tmp_path / "run")
    figures = stage.evaluate(state, stage.data())
    assert figures["r_mouth_open"] > 0.9
    assert all(abs(figures[f"r_{name}"]) < 0.3 for name in TRACKS[1:]), "noise cannot be heard"
    assert figures["f1_closures"] > 0.9, "closed lips are those of a low level"

    text = tmp_path / "text.safetensors"
    safetensors_io.save(text, {"text": small_models(CONFIG)[1].denoiser["text"]}, dtype=jnp.float32)
    pretrain = dit_pretrain.build(CONFIG, 0, {"audio": tmp_path / "run", "text": text}, dit_pretrain.Settings())
    started = pretrain.init().params["audio"]
    jax.tree.map(np.testing.assert_array_equal, started, load_weights(tmp_path / "run")["audio"])
    with pytest.raises(ValueError, match="dit_pretrain needs audio: run audio_pretrain first"):
        dit_pretrain.build(CONFIG, 0, {"text": text}, dit_pretrain.Settings())

    save_corpus(corpus_file, small_corpus())
    assert audio_pretrain.build(CONFIG, 0, {}, SETTINGS).config != stage.config, "on other speech it is another run"

    again = audio_pretrain.build(CONFIG, 1, {"audio": tmp_path / "run"}, SETTINGS).init().params
    jax.tree.map(np.testing.assert_array_equal, again["audio"], load_weights(tmp_path / "run")["audio"])


def test_losses_by_hand():
    truth = np.full((1, 4, 5), 0.5)
    truth[0, :, 0] = [0.04, 0.09, 0.11, 0.6]  # lips count as closed below 0.10
    tracks = truth.copy()
    tracks[0, 2, 3] += 0.2
    parts = audio_pretrain.readout_losses(jnp.asarray(tracks), jnp.array([[3.0, 0.0, -1.0, 2.0]]), jnp.asarray(truth))
    assert parts["tracks"] == pytest.approx(0.2**2 / 20)
    closed = [np.log1p(np.exp(-3.0)), np.log(2.0)]  # -log(sigmoid(logit))
    apart = [np.log1p(np.exp(-1.0)), np.log1p(np.exp(2.0))]  # -log(1 - sigmoid(logit))
    assert parts["closures"] == pytest.approx(np.mean(closed + apart), rel=1e-6)
