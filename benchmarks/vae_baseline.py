"""FlashVAE's decoder against a 3D-convolutional one of as many parameters: `python -m benchmarks.vae_baseline`, on this machine, in a minute or two.

For both: parameters, multiply-adds per latent frame (counted from the programs, matrix products and convolutions), and the time to decode, float32, one stream.
FlashVAE decodes frame by frame through its cache, as a stream does, and whole clips; the convolutions decode whole clips only, which
favours them (a stream would keep the last frames of every layer, and run one latent frame at a time). Speed does not depend on what the weights are, so they
are drawn at random. Where the run of `train.py vae_conv3d` is there, its last held-out figures stand beside: same latents, loss and updates.
"""

import dataclasses
import json
from pathlib import Path

import jax
import tyro

from benchmarks.timing import measure
from configs import preset
from pikastream_jax.config import Config
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.flash_vae.conv3d import Conv3DDecoder, conv3d_parameters, decoder_parameters, matching_width
from pikastream_jax.nn.layers import functional, initial_params
from pikastream_jax.nn.operations import matrix_operations
from pikastream_jax.training.metrics import METRICS_FILE

NAMES = {"flash_vae": "FlashVAE", "conv3d": "3D convolutions"}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """One row."""

    parameters: int
    multiply_adds: int  # for a latent frame
    clip_milliseconds: float  # for a latent frame, decoding whole clips
    step_milliseconds: float | None  # frame by frame; None where it cannot


def compare(config: Config, frames: int = 6) -> dict[str, Decoder]:
    """Counts and times both decoders on clips of `frames` latent frames of the preset's size."""
    vae_config, (rows, columns) = config.flash_vae, config.latent_grid
    width = matching_width(vae_config)
    latents = jax.random.normal(jax.random.key(0), (1, frames, rows, columns, vae_config.latent_channels))

    def build_flash(rngs):
        return FlashVAE(vae_config, impl="xla", rngs=rngs)

    def build_conv(rngs):
        return Conv3DDecoder(vae_config, width, rngs=rngs)

    flash, conv = functional(build_flash), functional(build_conv)
    flash_params, conv_params = (initial_params(build, jax.random.key(1)) for build in (build_flash, build_conv))

    def flash_clip(params, latents):
        return flash.bind(params).decode(latents)

    def flash_step(params, cache, latent):
        return flash.bind(params).decode_step(cache, latent)

    def conv_clip(params, latents):
        return conv.bind(params)(latents)

    def clip_time(decode, params) -> float:
        run = jax.jit(decode)
        return measure(lambda: jax.block_until_ready(run(params, latents)), per=frames).median

    cache = flash.bind(flash_params).init_decode_cache(1, rows, columns)
    step = jax.jit(flash_step, donate_argnums=1)

    def stream() -> None:
        nonlocal cache
        for index in range(frames):
            cache, video = step(flash_params, cache, latents[:, index])
        jax.block_until_ready(video)

    return {
        "flash_vae": Decoder(
            decoder_parameters(vae_config),
            matrix_operations(flash_step, flash_params, cache, latents[:, 0]) // 2,
            clip_time(flash_clip, flash_params),
            measure(stream, per=frames).median,
        ),
        "conv3d": Decoder(
            conv3d_parameters(vae_config, width),
            matrix_operations(conv_clip, conv_params, latents) // (2 * frames),
            clip_time(conv_clip, conv_params),
            None,
        ),
    }


def held_out(run: Path) -> dict[str, float]:
    """The last held-out figures of a run of `vae_conv3d`, and after how many updates; {} where there is no run."""
    if not (run / METRICS_FILE).is_file():
        return {}
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return next((row for row in reversed(rows) if row["kind"] == "held_out"), {})


def table(config: Config, decoders: dict[str, Decoder], figures: dict[str, float]) -> str:
    """Markdown."""
    stride = config.flash_vae.temporal_stride
    head = ["decoder", "parameters", "multiply-adds per latent frame", "whole clips", "frame by frame", "PSNR", "mouth", "detail agreement"]
    lines = [head, ["---"] * len(head)]
    for name, decoder in decoders.items():
        speeds = [f"{1e3 * stride / time:.0f} frames/s" if time else "-" for time in (decoder.clip_milliseconds, decoder.step_milliseconds)]
        quality = [
            f"{figures[f'{figure}_{name}']:.2f}{unit}" if f"{figure}_{name}" in figures else "-"
            for figure, unit in (("psnr", " dB"), ("psnr_mouth", " dB"), ("detail_agreement", ""))
        ]
        lines.append([NAMES[name], f"{decoder.parameters:,}", f"{decoder.multiply_adds / 1e6:,.0f} M", *speeds, *quality])
    after = f"held-out figures after {figures['step']} updates of each" if figures else "no run of vae_conv3d: no held-out figures"
    return "\n".join([f"{config.name}, {jax.devices()[0].device_kind}; {after}", "", *("| " + " | ".join(line) + " |" for line in lines)])


def main(config: str = "nano", run: Path | None = None) -> None:
    """Compares the decoders.

    Args:
      config: preset in configs/.
      run: folder of the run of `train.py vae_conv3d`; by default runs/CONFIG/vae_conv3d.
    """
    chosen = preset(config)
    print(table(chosen, compare(chosen), held_out(run or Path("runs") / config / "vae_conv3d")))


if __name__ == "__main__":
    tyro.cli(main)
