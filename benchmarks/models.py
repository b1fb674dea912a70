"""This project's own models, end to end: sound in, frames in host memory out; FlashVAE's decoder alone; `base_1_3b`'s denoising.

What runs is the service's own step in its serving form, with random weights of the served types and full windows.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import random_models
from benchmarks.correctness import row_name
from benchmarks.presets import DECODERS, STREAMS, decoder_config, is_dit_only, stream_config
from benchmarks.rows import Bench, Job, Measurement, NotOfferedError, NotRunError
from benchmarks.timing import measure, repeat, summarise
from pikastream_jax.config import Config
from pikastream_jax.dit.model import Conditions
from pikastream_jax.nn.operations import matrix_operations
from pikastream_jax.streaming.state import init_state
from pikastream_jax.streaming.step import Models, denoise_chunk, generate_step

LATENT_FRAMES_IN_FLIGHT = 8  # decoded one after another without waiting: a single one is over before the next is started
_COMPILERS = 4  # programs compiled at the same time
_MOST_COMPILING = 220.0  # seconds; what is not ready then is compiled by its own row, if there is time
_NO_LOCK = contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes of its arguments; the second argument is donated."""

    function: Callable
    arguments: tuple[Any, ...]

    def compile(self, tracing: contextlib.AbstractContextManager = _NO_LOCK) -> tuple[Any, dict[str, float]]:
        """The executable, and the seconds that tracing and compiling took.

        Args:
          tracing: a lock, where several threads compile.
        """
        with tracing:
            start = time.perf_counter()
            lowered = jax.jit(self.function, donate_argnums=1).lower(*self.arguments)
            traced = time.perf_counter()
        compiled = lowered.compile()
        return compiled, {"trace_seconds": traced - start, "compile_seconds": time.perf_counter() - traced}


def _step_program(config: Config) -> Program:
    models = random_models.served_models(config)
    arguments = random_models.abstract_params(models), jax.eval_shape(lambda: init_state(config, 1)), random_models.abstract_inputs(config)
    return Program(functools.partial(generate_step, models), arguments)


def _denoise_program(config: Config) -> Program:
    """From audio tokens, noise and motion to latents."""
    models = random_models.served_models(config)
    stream, dit, audio = config.stream, config.dit, config.audio

    def denoise(params, state, tokens, noise, motion):
        heard = models.denoiser.bind(params).dit.audio_keys_values(tokens)
        return denoise_chunk(models, params, state, Conditions(state.text, state.text_valid, heard, motion), noise)

    shape = jax.ShapeDtypeStruct
    arguments = (
        models.denoiser.abstract,
        jax.eval_shape(lambda: init_state(config, 1)),
        shape((1, stream.chunk, audio.tokens, audio.dim), jnp.dtype(stream.dtype)),
        shape((1, stream.chunk, *config.latent_grid, dit.latent_channels), jnp.float32),
        shape((1, stream.chunk, dit.motion), jnp.float32),
    )
    return Program(denoise, arguments)


def _decode_program(config: Config) -> Program:
    """One latent frame to uint8 frames, as the step does it; only the decoder's weights are arguments."""
    models = random_models.served_models(config)
    vae, used = models.flash_vae, ("latent_in", "decoder", "upsampler")
    rows, columns = config.latent_grid

    def decode(params, cache, statistics, latent):
        # The encoder's weights are never read: the compiler drops these zeros.
        rest = {name: part for name, part in vae.abstract.items() if name not in used}
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
        cache, frames = vae.bind(params | zeros).decode_step(cache, statistics.restore(latent))
        return cache, jnp.round((jnp.clip(frames, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)

    cache = jax.eval_shape(lambda: init_state(config, 1).vae)
    latent = jax.ShapeDtypeStruct((1, rows, columns, config.flash_vae.latent_channels), jnp.float32)
    params = {name: vae.abstract[name] for name in used}
    return Program(decode, (params, cache, random_models.abstract_statistics(config), latent))


def program_of(name: str, smoke: bool, unroll_steps: bool) -> Program:
    """The program that a row runs."""
    if name in DECODERS:
        return _decode_program(decoder_config(name, smoke))
    config = stream_config(name, smoke, unroll_steps)
    return _denoise_program(config) if is_dit_only(name) else _step_program(config)


def operations(name: str, smoke: bool, dit_only: bool = False) -> dict[str, int]:
    """Operations of the matrix products of a row's program, or of its denoising alone; those of e4m3 operands apart."""
    if name in DECODERS:
        config = decoder_config(name, smoke)
        config = dataclasses.replace(config, stream=dataclasses.replace(config.stream, attention="xla"))
        program = _decode_program(config)
    else:
        config = stream_config(name, smoke, unroll_steps=False)
        config = dataclasses.replace(config, stream=dataclasses.replace(config.stream, attention="xla"))
        program = _denoise_program(config) if dit_only or is_dit_only(name) else _step_program(config)
    total = matrix_operations(program.function, *program.arguments)
    stream = config.stream
    passes = 1 if stream.rolling else stream.steps + stream.clean_pass
    weights = sum(leaf.size for leaf in jax.tree.leaves(program.arguments[0]) if leaf.dtype == jnp.float8_e4m3fn)
    eighth = 2 * weights * passes * stream.in_flight * config.tokens_per_frame
    return {"bf16": total - eighth, "fp8": eighth} if eighth else {"bf16": total}


def _stream_bytes(models: Models, state: Any) -> int:
    """Weights of the blocks and caches read once in every pass, the decoder's once in every latent frame."""
    stream = models.config.stream
    passes = 1 if stream.rolling else stream.steps
    blocks = random_models.bytes_of(models.denoiser.abstract["dit"]["blocks"])
    decoder = {name: models.flash_vae.abstract[name] for name in ("latent_in", "decoder", "upsampler")}
    return passes * (blocks + random_models.bytes_of((state.dit_k, state.dit_v))) + stream.chunk * random_models.bytes_of(decoder)


def _peak() -> dict[str, int | None]:
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"peak_bytes": stats.get("peak_bytes_in_use")}


def _check_finite(tree: Any) -> None:
    """Raises FloatingPointError where a result is not a number."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in leaves):
        raise FloatingPointError("the result holds a value that is not a number")


def _check_picture(frames: np.ndarray) -> None:
    """Raises FloatingPointError where all pixels are the same, which NaN would become."""
    if frames.std() == 0:
        raise FloatingPointError("all pixels of the frames are the same")


def _compile(name: str, program: Program) -> tuple[Any, dict[str, float]]:
    try:
        return program.compile()
    except ValueError as error:
        if "impl '" in str(error):  # a front door's refusal
            raise NotOfferedError(str(error)) from error
        raise


def measure_stream(name: str, smoke: bool, unroll_steps: bool) -> Measurement:
    """Chunks of sound on the host to frames in host memory: in flight one behind the other, and one alone."""
    config = stream_config(name, smoke, unroll_steps)
    step, seconds = _compile(name, _step_program(config))
    models = random_models.served_models(config)
    compiling = _peak()["peak_bytes"]
    # The state first: drawing its large arrays takes memory for a moment, which must not be the peak.
    state, params, sound = random_models.full_state(config), random_models.model_params(models), random_models.Sound(config)
    moved = _stream_bytes(models, state)

    def start():
        nonlocal state
        state, frames = step(params, state, sound.next())
        return frames

    def alone() -> float:
        began = time.perf_counter()
        frames = start()
        frames.copy_to_host_async()
        np.asarray(frames)
        return (time.perf_counter() - began) * 1e3

    def apart() -> tuple[float, float]:
        began = time.perf_counter()
        frames = jax.block_until_ready(start())
        ready = time.perf_counter()
        np.asarray(frames)
        return (ready - began) * 1e3, (time.perf_counter() - ready) * 1e3

    waiting = []

    def overlapped() -> float:
        """As `Session.step` and the service's threads do: the next chunk is started before the last one's frames are waited for."""
        frames = start()
        frames.copy_to_host_async()
        waiting.append(frames)
        if len(waiting) > 1:
            np.asarray(waiting.pop(0))
        return time.perf_counter() * 1e3

    began = time.perf_counter()
    _check_picture(np.asarray(start()))
    first = time.perf_counter() - began
    device, copy = zip(*repeat(apart), strict=True)
    latency = summarise(repeat(alone))
    arrivals = repeat(overlapped, least=12, warm_up=3)
    _check_finite((state.dit_k, state.vae.k))
    ms = summarise(np.diff(arrivals), warm_up=3)
    chunks = len(arrivals) - 1
    figures = {
        "fps": config.chunk_frames * chunks / (arrivals[-1] - arrivals[0]) * 1e3,
        "first_frame_ms": latency,
        "step_ms": summarise(device),
        "copy_ms": summarise(copy),
        "first_call_seconds": first,
        "compiling_peak_bytes": compiling,  # of choosing kernels, where the program was not in the cache
        "unroll_steps": config.stream.unroll_steps,
        "attention": config.stream.attention,
    }
    return Measurement(
        f"{config.chunk_frames} frames of {config.stream.height}x{config.stream.width}: sound in host memory to uint8 frames in host memory, audio encoder "
        "and FlashVAE decoder included, window full; ms: from one chunk's frames to the next one's while chunks follow each other; first_frame_ms: one "
        "chunk alone, from its last sample to its frames; step_ms and copy_ms: its two parts",
        ms,
        operations(name, smoke),
        moved,
        figures | seconds | _peak(),
    )


def measure_denoising(name: str, smoke: bool, unroll_steps: bool) -> Measurement:
    """The DiT alone."""
    config = stream_config(name, smoke, unroll_steps)
    program = _denoise_program(config)
    denoise, seconds = _compile(name, program)
    models = random_models.served_models(config)
    state, params = random_models.full_state(config), random_models.draw_params(models.denoiser.abstract, jax.random.key(0))
    given = [jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype) for i, leaf in enumerate(program.arguments[2:])]
    stream = config.stream
    moved = stream.steps * random_models.bytes_of((models.denoiser.abstract["dit"]["blocks"], state.dit_k, state.dit_v))
    latents = None

    def run():
        nonlocal state, latents
        state, latents = denoise(params, state, *given)
        jax.block_until_ready(latents)

    ms = measure(run)
    _check_finite(latents)
    figures = {"fps": config.chunk_frames / ms.median * 1e3, "unroll_steps": stream.unroll_steps, "attention": stream.attention}
    return Measurement(
        f"{config.chunk_frames} frames: {stream.steps} denoising steps of a chunk of {stream.chunk} latent frames, window of {stream.window} full, turning the "
        "cache and writing it included, audio and text encoders and the decoder not",
        ms,
        operations(name, smoke),
        moved,
        figures | seconds | _peak(),
    )


def measure_decoder(name: str, smoke: bool) -> Measurement:
    """FlashVAE's decoder alone, with nothing else in the device's memory."""
    config = decoder_config(name, smoke)
    program = _decode_program(config)
    decode, seconds = _compile(name, program)
    compiling = _peak()["peak_bytes"]
    params = random_models.draw_params(program.arguments[0], jax.random.key(0))
    cache = random_models.full_cache(program.arguments[1], jax.random.key(1), config.flash_vae.window)
    statistics = random_models.statistics(config)
    latents = [jax.random.normal(jax.random.key(i), program.arguments[3].shape) for i in range(LATENT_FRAMES_IN_FLIGHT)]
    frames = None

    def run(count: int):
        nonlocal cache, frames
        for latent in latents[:count]:
            cache, frames = decode(params, cache, statistics, latent)
        jax.block_until_ready(frames)

    ms = measure(lambda: run(LATENT_FRAMES_IN_FLIGHT), per=LATENT_FRAMES_IN_FLIGHT)
    one = measure(lambda: run(1))
    _check_picture(np.asarray(frames))
    _check_finite(cache.k)
    height, width = config.stream.height, config.stream.width
    return Measurement(
        f"a latent frame to 4 uint8 frames of {height}x{width} on the device, bfloat16, window full; {LATENT_FRAMES_IN_FLIGHT} started one after another, time "
        "of one; one_ms: one alone",
        ms,
        operations(name, smoke),
        random_models.bytes_of(params),
        {"fps": 4e3 / ms.median, "one_ms": one, "parameter_bytes": random_models.bytes_of(params), "compiling_peak_bytes": compiling}
        | seconds
        | _peak(),
    )


class Compilations:
    """Compiles many programs at once, so that the rows' own processes find them in the persistent cache."""

    def __init__(self, smoke: bool, unroll_steps: bool):
        self._smoke, self._unroll_steps = smoke, unroll_steps
        self._futures: dict[str, concurrent.futures.Future] = {}

    def start(self, rows: list[str]) -> None:
        """Tracing takes its turn (it is Python); compiling does not. XLA times candidates of one kernel at a time, whatever the threads."""
        tracing = threading.Lock()
        pool = concurrent.futures.ThreadPoolExecutor(_COMPILERS)
        for row in rows:
            self._futures[row] = pool.submit(self._one, row.removeprefix("compile/"), tracing)

    def _one(self, name: str, tracing: contextlib.AbstractContextManager) -> dict[str, float]:
        with tracing:
            program = program_of(name, self._smoke, self._unroll_steps)
        compiled, seconds = program.compile(tracing)
        memory = compiled.memory_analysis()
        sizes = {part: getattr(memory, f"{part}_size_in_bytes") for part in ("argument", "output", "alias", "temp")} if memory else {}
        return seconds | {f"{part}_bytes": size for part, size in sizes.items()}

    def result(self, row: str) -> Measurement:
        return Measurement(
            f"tracing and compiling, {_COMPILERS} programs at a time; sizes as XLA plans them", figures=self._futures[row].result()
        )


def _bench(name: str, smoke: bool, unroll_steps: bool) -> Bench:
    if name in DECODERS:
        return Bench(name, functools.partial(measure_decoder, name, smoke), seconds=12)
    run = measure_denoising if is_dit_only(name) else measure_stream
    requires = tuple(row_name(kernel, "mosaic", "forward") for kernel in ("ring", "frame")) if name.endswith("_mosaic") else ()
    if smoke and requires:
        return Bench(name, _needs_gpu)
    return Bench(name, functools.partial(run, name, smoke, unroll_steps), seconds=30, requires=requires)


def _needs_gpu() -> Measurement:
    raise NotRunError("smoke: this implementation needs a GPU")


def names() -> list[str]:
    """All rows' names, most important first."""
    streams = list(STREAMS)
    return [*streams[:3], "flash_vae/480p", *streams[3:6], "flash_vae/720p", *streams[6:]]


def compile_job(smoke: bool, unroll_steps: bool) -> Job:
    """Fills the persistent cache."""
    compilations = Compilations(smoke, unroll_steps)
    benches = []
    for name in names():
        if smoke and name.endswith("_mosaic"):
            continue
        row = f"compile/{name}"
        requires = _bench(name, smoke, unroll_steps).requires
        benches.append(Bench(row, functools.partial(compilations.result, row), seconds=10, limit_seconds=200, requires=requires))
    return Job("compile", tuple(benches), compilations.start, most_seconds=_MOST_COMPILING)


def jobs(smoke: bool, unroll_steps: bool) -> dict[str, Job]:
    """One process to every row: so the peak of memory is its own."""
    return {name: Job(name, (_bench(name, smoke, unroll_steps),)) for name in names()}

