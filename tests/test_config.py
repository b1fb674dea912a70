"""Every wrong setting is refused where it is made, by a message with the value and the limit."""

import dataclasses
import re

import jax
import pytest

from configs import preset
from pikastream_jax.config import AudioConfig, Config, DiTConfig, FlashVAEConfig, StreamConfig, TextConfig
from pikastream_jax.nn.layers import parameter_count
from pikastream_jax.streaming.step import Models

WRONG = [
    (AudioConfig, {"dim": 100, "heads": 3}, "audio: dim 100 is not a multiple of heads 3"),
    (AudioConfig, {"heads": 0}, "audio: heads 0 must be at least 1"),
    (AudioConfig, {"dim": 32, "heads": 4}, "audio: head dim 8 (dim 32 / heads 4) must be even and >= 12"),
    (AudioConfig, {"mel_frames": 90}, "audio: mel_frames 90 must be 4 x tokens (96)"),
    (AudioConfig, {"hop": 200}, "audio: a slice of 19320 samples is longer than one second (16000)"),
    (AudioConfig, {"window": 600}, "audio: window 600 does not fit the 512-point transform"),
    (AudioConfig, {"look_ahead": -1}, "audio: look_ahead -1 samples must lie in [0, 15520)"),
    (AudioConfig, {"look_ahead": 15520}, "audio: look_ahead 15520 samples must lie in [0, 15520)"),
    (TextConfig, {"length": 0}, "text: length 0 must be at least 1 token"),
    (TextConfig, {"dim": 60, "heads": 4}, "text: head dim 15 (dim 60 / heads 4) must be even"),
    (FlashVAEConfig, {"encoder_dim": 100}, "flash_vae encoder: dim 100 is not a multiple of heads 3"),
    (FlashVAEConfig, {"decoder_kv_heads": 3}, "flash_vae decoder: heads 4 is not a multiple of kv_heads 3"),
    (FlashVAEConfig, {"decoder_kv_heads": 0}, "flash_vae decoder: heads 4 is not a multiple of kv_heads 0"),
    (FlashVAEConfig, {"refine_heads": 16}, "flash_vae refinement: head dim 8"),
    (FlashVAEConfig, {"window": 0}, "flash_vae: window 0 must be at least 1"),
    (FlashVAEConfig, {"temporal_stride": 0}, "flash_vae: temporal_stride 0 must be at least 1"),
    (DiTConfig, {"heads": 3}, "dit: dim 256 is not a multiple of heads 3"),
    (DiTConfig, {"frequency_dim": 255}, "dit: frequency_dim 255 must be even"),
    (DiTConfig, {"patch": 0}, "dit: patch 0 must be at least 1"),
    (StreamConfig, {"fps": 0}, "stream: fps 0 must be at least 1"),
    (StreamConfig, {"height": 0}, "stream: height 0 must be at least 1"),
    (StreamConfig, {"chunk": 0}, "stream: chunk 0 must be at least 1"),
    (StreamConfig, {"window": 7}, "stream: window 7 must be a positive multiple of chunk 3"),
    (StreamConfig, {"window": 0}, "stream: window 0 must be a positive multiple of chunk 3"),
    (StreamConfig, {"sink": 2}, "stream: sink 2 must be 0 or a positive multiple of chunk 3"),
    (StreamConfig, {"sink": -3}, "stream: sink -3 must be 0 or a positive multiple of chunk 3"),
    (StreamConfig, {"steps": 0}, "stream: steps 0 must lie in 1-64"),
    (StreamConfig, {"steps": 65}, "stream: steps 65 must lie in 1-64"),
    (StreamConfig, {"shift": 0.0}, "stream: shift 0.0 must be positive and finite"),
    (StreamConfig, {"shift": float("nan")}, "stream: shift nan must be positive and finite"),
    (StreamConfig, {"attention": "flash"}, "stream: attention 'flash' is not one of auto, xla, mosaic"),
    (StreamConfig, {"schedule": "sideways"}, "stream: schedule 'sideways' is not one of sequential, rolling"),
    (StreamConfig, {"precision": "int4"}, "stream: precision 'int4' is not one of float32, bfloat16, float8"),
    (StreamConfig, {"schedule": "rolling", "clean_pass": True}, "stream: clean_pass True needs schedule 'sequential'"),
    (StreamConfig, {"reference_distance": 3}, "stream: reference_distance 3 must lie in 4-30"),
    (StreamConfig, {"steps": 12, "schedule": "rolling"}, "stream: 36 latent frames in flight (steps 12 x chunk 3) are more than 29"),
    (StreamConfig, {"reference_distance": 22, "schedule": "rolling"}, "stream: reference_distance 22 must lie in 4-21"),
    (StreamConfig, {"reference_distance": 31}, "stream: reference_distance 31 must lie in 4-30"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), WRONG, ids=[f"{k.__name__}-{f}" for k, f, _ in WRONG])
def test_wrong_settings_are_named(kind, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**fields)


MISMATCHED = [
    ({"dit": DiTConfig(latent_channels=8)}, "dit.latent_channels 8 differs from flash_vae.latent_channels 16"),
    ({"dit": DiTConfig(text_dim=64)}, "dit.text_dim 64 differs from text.dim 128"),
    ({"dit": DiTConfig(audio_dim=64)}, "dit.audio_dim 64 differs from audio.dim 128"),
    ({"stream": StreamConfig(height=250)}, "a picture of 250x256 pixels is not a multiple of 16 each way"),
    ({"stream": StreamConfig(width=272)}, "16x17 latents are not a multiple of the DiT's patch 2"),
]


@pytest.mark.parametrize(("parts", "message"), MISMATCHED, ids=[next(iter(p)) + m[-12:] for p, m in MISMATCHED])
def test_parts_that_do_not_fit_each_other_are_named(parts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(name="wrong", **parts)


def test_settings_are_frozen_and_comparable():
    config = preset("tiny")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"
    assert config == preset("tiny") and hash(config) == hash(preset("tiny"))
    with pytest.raises(ValueError, match="stream: chunk 0"):
        dataclasses.replace(config.stream, chunk=0)


def test_sizes_of_the_shipped_preset():
    """What the project promises of `tiny`: 256x256, 25 FPS, a DiT of at least 8 M parameters, 28 MB in bfloat16."""
    config = preset("tiny")
    assert (config.stream.height, config.stream.width, config.stream.fps) == (256, 256, 25)
    assert config.latent_grid == (16, 16) and config.token_grid == (8, 8) and config.tokens_per_frame == 64
    assert config.chunk_frames == 12
    assert [config.latent_end_sample(n) for n in (0, 1, 9)] == [2560, 5120, 25_600]
    models = Models.of(config)
    assert parameter_count(models.denoiser.abstract["dit"]) >= 8e6
    total = parameter_count(models.denoiser.abstract) + parameter_count(models.flash_vae.abstract)
    assert 2 * total <= 28e6
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(models.denoiser.abstract))


def test_the_clock_is_rounded_from_the_count_and_never_accumulated():
    config = Config(name="film", stream=StreamConfig(fps=24))
    assert [config.latent_end_sample(n) for n in range(3)] == [2667, 5333, 8000]
    assert config.latent_end_sample(24 * 60 * 60 * 10 // 4 - 1) == 10 * 60 * 60 * 16_000, (
        "after ten hours, to the sample"
    )


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="no preset is called 'huge'; choose one of base_1_3b, nano, pikastream_9b, tiny"):
        preset("huge")
