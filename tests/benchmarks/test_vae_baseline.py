"""The comparison of decoders runs at a tiny size, and counts what can be counted by hand."""

import json

import pytest

from benchmarks.vae_baseline import Decoder, compare, held_out, table
from pikastream_jax.flash_vae.conv3d import matching_width
from tests.small import small_config


@pytest.mark.slow
def test_both_decoders_are_counted_and_timed(tmp_path):
    config = small_config(height=32, width=32)
    decoders = compare(config, frames=2)
    flash, conv = decoders["flash_vae"], decoders["conv3d"]
    assert abs(conv.parameters - flash.parameters) <= 0.05 * flash.parameters
    assert conv.clip_milliseconds > 0 and flash.step_milliseconds > 0 and conv.step_milliseconds is None

    # Latents 4x4 of 4 channels; widths for strides 8, 4, 2, 1 and frames 1, 2, 4, 4.
    widths = [14, 14, 7, 4]
    assert int(4 * matching_width(config.flash_vae)) == widths[0]
    places = [16, 2 * 64, 4 * 256, 4 * 1024]
    products = places[0] * 27 * (4 * 14 + 4 * 14 * 14)
    for level in range(3):
        wide, narrow = widths[level : level + 2]
        if level < 2:
            products += places[level] * 27 * wide * 2 * wide
        products += places[level + 1] * (9 * wide * narrow + 2 * 27 * narrow * narrow)
    products += places[3] * 27 * 4 * 3
    assert conv.multiply_adds == products

    figures = {f"{figure}_{name}": 20.0 for figure in ("psnr", "psnr_mouth", "detail_agreement") for name in decoders}
    rows = [{"step": 10, "kind": "held_out", **figures}, {"step": 20, "kind": "train", "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = table(config, decoders, held_out(tmp_path))
    assert "after 10 updates" in told and told.count("20.00 dB") == 4
    assert "no held-out figures" in table(config, decoders, held_out(tmp_path / "nowhere"))


def test_speed_is_in_video_frames():
    decoders = {"flash_vae": Decoder(10, 2_000_000, 8.0, 4.0)}
    assert "| 2 M | 500 frames/s | 1000 frames/s |" in table(small_config(), decoders, {})
