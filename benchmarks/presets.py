"""Which full-size streams and decoders are measured, and the little ones that stand in for them where there is no GPU. Imports no JAX."""

import dataclasses
from collections.abc import Mapping

from configs import preset
from pikastream_jax.config import Config

# Row name -> preset and what differs in its stream; the order is that of importance.
STREAMS: Mapping[str, tuple[str, Mapping]] = {
    "9b/chunk3_steps4_bf16": ("pikastream_9b", {}),
    "9b/chunk3_steps4_fp8": ("pikastream_9b", {"precision": "float8"}),
    "9b/chunk1_steps4_bf16": ("pikastream_9b", {"chunk": 1}),
    "base_1_3b/window18": ("base_1_3b", {}),
    "base_1_3b/window6": ("base_1_3b", {"window": 6}),
    "9b/chunk3_steps4_bf16_mosaic": ("pikastream_9b", {"attention": "mosaic"}),
    "9b/chunk1_steps4_fp8": ("pikastream_9b", {"chunk": 1, "precision": "float8"}),
    "9b/chunk3_steps2_bf16": ("pikastream_9b", {"steps": 2}),
    "9b/chunk3_steps2_fp8": ("pikastream_9b", {"steps": 2, "precision": "float8"}),
    "9b/rolling_steps4_bf16": ("pikastream_9b", {"schedule": "rolling"}),
    "9b/chunk1_steps2_bf16": ("pikastream_9b", {"chunk": 1, "steps": 2}),
    "9b/chunk1_steps2_fp8": ("pikastream_9b", {"chunk": 1, "steps": 2, "precision": "float8"}),
    "base_1_3b/window18_with_decode": ("base_1_3b", {}),
    "base_1_3b/window6_with_decode": ("base_1_3b", {"window": 6}),
}
DECODERS = {"flash_vae/480p": (480, 832), "flash_vae/720p": (720, 1280)}


def is_dit_only(name: str) -> bool:
    """base_1_3b is compared with students whose figures leave out the decoder."""
    return name.startswith("base_1_3b") and not name.endswith("_with_decode")


def stream_config(name: str, smoke: bool, unroll_steps: bool = True) -> Config:
    """The preset of a row."""
    base, changes = STREAMS[name]
    config = preset(base, unroll_steps=unroll_steps, **changes)
    return _small(config) if smoke else config


def decoder_config(name: str, smoke: bool) -> Config:
    """FlashVAE at full size for pictures of another size; the DiT, which is not run, has a patch of 1 because 45 rows of latents are no multiple of 2."""
    config = preset("pikastream_9b")
    height, width = DECODERS[name]
    config = dataclasses.replace(
        config,
        dit=dataclasses.replace(config.dit, patch=1),
        stream=dataclasses.replace(config.stream, height=height, width=width),
    )
    return _small(config) if smoke else config


def _small(config: Config) -> Config:
    """The same stream with models of a few thousand parameters."""
    replace = dataclasses.replace
    vae = dict(encoder_dim=32, encoder_blocks=1, encoder_heads=2, encoder_kv_heads=1, decoder_dim=32, decoder_blocks=2, decoder_heads=2)
    vae |= dict(decoder_kv_heads=1, refine_dim=32, refine_blocks=1, refine_heads=2, head_hidden=16, latent_channels=4, spatial_stride=8)
    window = 6 if config.stream.window > 6 else 3
    return replace(
        config,
        audio=replace(config.audio, mels=16, mel_frames=16, tokens=4, dim=32, blocks=1, heads=2),
        text=replace(config.text, length=6, vocabulary=64, dim=32, blocks=1, heads=2),
        flash_vae=replace(config.flash_vae, **vae),
        dit=replace(config.dit, dim=32, heads=2, blocks=2, mlp_dim=64, latent_channels=4, frequency_dim=32, text_dim=32, audio_dim=32),
        stream=replace(config.stream, height=32, width=48, window=window, unroll_steps=False),
    )
