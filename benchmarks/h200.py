"""What the served programs need on an H200, without one: `python -m benchmarks.h200` compiles them and prints a table.

Memory, copies and the registers of our kernels are the compiler's own word (`benchmarks.deviceless`). cuDNN cannot be compiled there, so
attention is Mosaic's. Compiled here, not executed.
"""

import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks.deviceless import Program, available, compile_kernels, compile_program
from benchmarks.random_models import abstract_params, served_models
from configs import preset
from pallas_kernels import chunked_attention, frame_attention, ring_attention
from pikastream_jax.audio.slices import max_chunk_samples
from pikastream_jax.config import Config
from pikastream_jax.streaming.state import StepInputs, StreamState, init_state
from pikastream_jax.streaming.step import ModelParams, Models, generate_step

GIB, MIB = 2**30, 2**20
STEPS = {
    "9B, chunk 3, bfloat16": ("pikastream_9b", {}),
    "9B, chunk 3, float8": ("pikastream_9b", {"precision": "float8"}),
    "9B, chunk 1, bfloat16": ("pikastream_9b", {"chunk": 1}),
    "9B, rolling, bfloat16": ("pikastream_9b", {"schedule": "rolling"}),
    "1.3B, window 18": ("base_1_3b", {}),
    "1.3B, window 6": ("base_1_3b", {"window": 6}),
}


def abstract_step(config: Config, batch: int = 1) -> tuple[Models, ModelParams, StreamState, StepInputs]:
    """Models in serving form, and the shapes of all arguments of `generate_step`."""
    models = served_models(config)
    inputs = StepInputs(
        jax.ShapeDtypeStruct((batch, max_chunk_samples(config)), jnp.float32),
        jax.ShapeDtypeStruct((batch, config.stream.chunk), jnp.int32),
    )
    return models, abstract_params(models), jax.eval_shape(lambda: init_state(config, batch)), inputs


def compile_step(config: Config, batch: int = 1) -> Program:
    """The chunk step, sound to pixels, with its state donated."""
    models, params, state, inputs = abstract_step(config, batch)
    return compile_program(functools.partial(generate_step, models), params, state, inputs, donate_argnums=1)


def compile_decoder(config: Config, height: int, width: int) -> Program:
    """FlashVAE's decoder alone: one latent frame to uint8 pixels, with the decoder's weights only."""
    functional = served_models(config).flash_vae
    rows, columns = config.flash_vae.grid(height, width)

    def decode(params, cache, latent):
        cache, frames = functional.bind({**functional.abstract, **params}).decode_step(cache, latent)
        return cache, jnp.round((jnp.clip(frames, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)

    params = {name: functional.abstract[name] for name in ("latent_in", "decoder", "upsampler")}
    vae = functional.bind(functional.abstract)
    cache = jax.eval_shape(lambda: vae.init_decode_cache(1, rows, columns))
    latent = jax.ShapeDtypeStruct((1, rows, columns, config.flash_vae.latent_channels), jnp.float32)
    return compile_program(decode, params, cache, latent, donate_argnums=1)


def _bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _lengths(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _ring(t: int, heads: int, head_dim: int, kv_heads: int, layers: int, slots: int, fixed: int, batch: int = 1):
    def kernel(q, k, v, cache_k, cache_v, fixed_valid, ring_valid):
        lengths = {"fixed_slots": fixed, "fixed_valid": fixed_valid, "ring_valid": ring_valid}
        return ring_attention(q, k, v, cache_k, cache_v, layer=layers // 2, impl="mosaic", **lengths)

    own, cache = _bfloat16(batch, t, kv_heads, head_dim), _bfloat16(layers, batch, slots, kv_heads, head_dim)
    return kernel, _bfloat16(batch, t, heads, head_dim), own, own, cache, cache, _lengths(batch), _lengths(batch)


def _frames(f: int, t: int, a: int, heads: int, head_dim: int, gradient: bool = False):
    def forward(q, k, v):
        return frame_attention(q, k, v, impl="mosaic")

    def backward(q, k, v):
        return jax.vjp(forward, q, k, v)[1](q)

    keys = _bfloat16(1, f, a, heads, head_dim)
    return backward if gradient else forward, _bfloat16(1, f, t, heads, head_dim), keys, keys


def _chunked(f: int, tokens: int, heads: int, kv_heads: int, head_dim: int, gradient: bool = False):
    def forward(q, k, v, fixed, chunk_ids):
        return chunked_attention(q, k, v, chunk_ids=chunk_ids, window=12, copies=2, fixed=fixed, impl="mosaic")

    def backward(q, k, v, fixed, chunk_ids):
        return jax.vjp(lambda *x: forward(*x, chunk_ids), q, k, v, fixed)[1](q)

    q, k = _bfloat16(1, 2 * f * tokens, heads, head_dim), _bfloat16(1, 2 * f * tokens, kv_heads, head_dim)
    reference = _bfloat16(1, tokens, kv_heads, head_dim)
    return backward if gradient else forward, q, k, k, (q, reference, reference), _lengths(1, f)


KERNELS = {
    "ring, 9B, chunk 3": _ring(1170, 32, 128, 32, 30, 5070, 390),
    "ring, 9B, chunk 1": _ring(390, 32, 128, 32, 30, 5070, 390),
    "ring, 9B, chunk 3, 4 streams": _ring(1170, 32, 128, 32, 30, 5070, 390, batch=4),
    "ring, 1.3B, window 18": _ring(4680, 12, 128, 12, 30, 29_640, 1560),
    "ring, FlashVAE decoder": _ring(1560, 16, 64, 4, 12, 3120, 0),
    "frame, sound, 9B": _frames(3, 390, 32, 32, 128),
    "frame, sound, 9B, gradient": _frames(12, 390, 32, 32, 128, gradient=True),
    "frame, sound, head dim 64, gradient": _frames(12, 64, 24, 4, 64, gradient=True),
    "frame, prompt, 9B": _frames(1, 1170, 128, 32, 128),
    "frame, refinement": _frames(1, 6240, 6240, 8, 64),
    "chunked, 9B, 12 latent frames": _chunked(12, 390, 32, 32, 128),
    "chunked, 9B, gradient": _chunked(12, 390, 32, 32, 128, gradient=True),
    "chunked, grouped, head dim 64, gradient": _chunked(12, 64, 4, 2, 64, gradient=True),
}


def main() -> int:
    if not available():
        print("benchmarks.h200: no CUDA compiler on the path: run `make h200`", file=sys.stderr)
        return 1
    print(f"{'kernels':40} {'registers at launch':>20} {'bytes spilled':>14}")
    for name, (kernel, *args) in KERNELS.items():
        for found in sorted(set(dataclasses.astuple(one)[1:] for one in compile_kernels(kernel, *args))):
            print(f"{name:40} {found[0]:20} {found[1]:14}", flush=True)
    print(f"\n{'program':32} {'arguments':>10} {'temporary':>10} {'peak':>10} {'compiled in':>12}  copies of 16 MiB or more")
    programs = {name: functools.partial(compile_step, preset(which, attention="mosaic", **fields)) for name, (which, fields) in STEPS.items()}
    for height, width in ((480, 832), (720, 1280)):
        decoder = functools.partial(compile_decoder, preset("pikastream_9b", attention="mosaic"), height, width)
        programs[f"FlashVAE decoder, {height}x{width}"] = decoder
    for name, compile_it in programs.items():
        began = time.perf_counter()
        program = compile_it()
        sizes = " ".join(f"{size / GIB:6.2f} GiB" for size in (program.arguments, program.temporaries, program.peak))
        print(f"{name:32} {sizes} {time.perf_counter() - began:10.0f} s  {len(program.copies(16 * MIB))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
