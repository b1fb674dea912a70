"""What the served programs need on an H200, without one: `python -m benchmarks.h200` compiles them and prints a table.

Memory, copies and the registers of our kernels are the compiler's own word (`benchmarks.deviceless`). cuDNN cannot be compiled there, so
attention is Mosaic's. Compiled, never executed.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks.deviceless import Program, available, compile_program
from configs import preset
from pikastream_jax.audio.slices import max_chunk_samples
from pikastream_jax.config import Config
from pikastream_jax.flash_vae.latents import LatentStatistics
from pikastream_jax.streaming.serving_form import serving_models
from pikastream_jax.streaming.state import StepInputs, StreamState, init_state
from pikastream_jax.streaming.step import ModelParams, Models, generate_step

GIB, MIB = 2**30, 2**20
PROGRAMS = {
    "9B, chunk 3, bfloat16": ("pikastream_9b", {}),
    "9B, chunk 3, float8": ("pikastream_9b", {"precision": "float8"}),
    "9B, chunk 1, bfloat16": ("pikastream_9b", {"chunk": 1}),
    "9B, rolling, bfloat16": ("pikastream_9b", {"schedule": "rolling"}),
    "1.3B, window 18": ("base_1_3b", {}),
    "1.3B, window 6": ("base_1_3b", {"window": 6}),
}


def abstract_step(config: Config, batch: int = 1) -> tuple[Models, ModelParams, StreamState, StepInputs]:
    """Models in serving form, and the shapes of all arguments of `generate_step`."""
    models = serving_models(Models.of(config))
    channels = jax.ShapeDtypeStruct((config.dit.latent_channels,), jnp.float32)
    params = ModelParams(models.denoiser.abstract, models.flash_vae.abstract, LatentStatistics(channels, channels))
    inputs = StepInputs(
        jax.ShapeDtypeStruct((batch, max_chunk_samples(config)), jnp.float32),
        jax.ShapeDtypeStruct((batch, config.stream.chunk), jnp.int32),
    )
    return models, params, jax.eval_shape(lambda: init_state(config, batch)), inputs


def compile_step(config: Config, batch: int = 1) -> Program:
    """The chunk step, sound to pixels, with its state donated."""
    models, params, state, inputs = abstract_step(config, batch)
    return compile_program(functools.partial(generate_step, models), params, state, inputs, donate_argnums=1)


def compile_decoder(config: Config, height: int, width: int) -> Program:
    """FlashVAE's decoder alone: one latent frame to uint8 pixels, with the decoder's weights only."""
    functional = serving_models(Models.of(config)).flash_vae
    rows, columns = config.flash_vae.grid(height, width)

    def decode(params, cache, latent):
        cache, frames = functional.bind({**functional.abstract, **params}).decode_step(cache, latent)
        return cache, jnp.round((jnp.clip(frames, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)

    params = {name: functional.abstract[name] for name in ("latent_in", "decoder", "upsampler")}
    vae = functional.bind(functional.abstract)
    cache = jax.eval_shape(lambda: vae.init_decode_cache(1, rows, columns, jnp.dtype(config.stream.dtype)))
    latent = jax.ShapeDtypeStruct((1, rows, columns, config.flash_vae.latent_channels), jnp.float32)
    return compile_program(decode, params, cache, latent, donate_argnums=1)


def main() -> int:
    if not available():
        print("benchmarks.h200: no CUDA compiler: run `make h200`, or set PIKASTREAM_CUDA_WHEELS", file=sys.stderr)
        return 1
    print(f"{'program':28} {'arguments':>10} {'temporary':>10} {'peak':>8} {'compiling':>10}  copies >= 16 MiB; kernels")
    for name, (which, fields) in PROGRAMS.items():
        began = time.perf_counter()
        show(name, compile_step(preset(which, attention="mosaic", **fields)), time.perf_counter() - began)
    for height, width in ((480, 832), (720, 1280)):
        began = time.perf_counter()
        program = compile_decoder(preset("pikastream_9b", attention="mosaic"), height, width)
        show(f"FlashVAE decoder, {height}x{width}", program, time.perf_counter() - began)
    return 0


def show(name: str, program: Program, seconds: float) -> None:
    """Prints a row of the table."""
    kernels = {(kernel.name, kernel.registers, kernel.spilled) for kernel in program.kernels}
    said = "; ".join(f"{kernel}: {registers} registers, {spilled} B spilled" for kernel, registers, spilled in sorted(kernels))
    print(
        f"{name:28} {program.arguments / GIB:8.2f} G {program.temporaries / GIB:8.2f} G {program.peak / GIB:6.2f} G "
        f"{seconds:8.0f} s  {len(program.copies(16 * MIB))}; {said}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
