"""The attention kernels' implementations against each other at the presets' shapes, and the turning of the cached keys."""

import functools

import jax
import jax.numpy as jnp

from benchmarks import cases
from benchmarks.cases import Case, Chunked, Frame, Ring
from benchmarks.ceilings import sets_beyond_cache
from benchmarks.correctness import IMPLEMENTATIONS, refusal, row_name
from benchmarks.rows import Bench, Job, Measurement, NotOfferedError, NotRunError
from benchmarks.timing import measure
from configs import preset
from pikastream_jax.nn.rope import grid_positions, rope_tables, rotate
from pikastream_jax.streaming.step import slot_times

_REAL: dict[str, Case] = {
    "ring_9b": cases.nine_b_ring(),
    "audio_9b": cases.AUDIO_9B,
    "ring_1_3b_window18": cases.base_ring(18),
    "ring_1_3b_window6": cases.base_ring(6),
    "ring_flash_vae": cases.FLASH_VAE_RING,
    "refine_flash_vae": cases.REFINEMENT,
    "text_9b": cases.TEXT_9B,
    "text_1_3b": cases.TEXT_1_3B,
    "ring_9b_chunk1": cases.nine_b_ring(1),
    "training_9b": cases.training(32, 390),
    "training_1_3b": cases.training(12, 1560),
}
_SMALL: dict[str, Case] = {
    "ring_9b": Ring(6, 2, 2, 16, 2, 12, 3, (3,), (9,)),
    "audio_9b": Frame(1, 2, 6, 4, 2, 2, 16),
    "training_9b": Chunked(((0, 0, 1, 1),), 3, 2, 2, 3, 2, 2, 16),
}
_MOST_LAYERS = 8  # of the cache, timed one after another


def _time(case: Case, impl: str, smoke: bool) -> Measurement:
    if smoke and impl != "xla":
        raise NotRunError("smoke: this implementation needs a GPU")
    flops = 4 * case.head_dim * case.pairs
    if isinstance(case, Ring):
        # Layers of one cache, which is read where it lies.
        count = min(_MOST_LAYERS, case.layers)
        sets = [jax.jit(case.draw)(jax.random.key(0))]

        def program(sets):
            return [case.attend(sets[0], impl, layer) for layer in range(count)]

        what = f"{count} layers of one cache, one after another in one program, time of one"
    elif isinstance(case, Chunked):
        count = 1
        sets = [jax.jit(case.draw)(jax.random.key(0))]
        d_out = jax.random.normal(jax.random.key(1), sets[0][0].shape, jnp.bfloat16)
        flops = 7 * flops // 2  # two products forwards, five backwards, as in FlashAttention-2 (arXiv 2307.08691)

        def program(sets):
            out, backward = jax.vjp(lambda arrays: case.attend(arrays, impl), sets[0])
            return out, backward(d_out)

        what = "forward and backward of one layer; operations of what is seen, backward as 2.5 forwards"
    else:
        count = 1 if smoke else max(8, sets_beyond_cache(case.bytes))
        draw = jax.jit(case.draw)
        sets = [draw(key) for key in jax.random.split(jax.random.key(0), count)]

        def program(sets):
            return [case.attend(arrays, impl) for arrays in sets]

        what = f"{count} layers, each with its own random arrays, one after another in one program, time of one"
    try:
        compiled = jax.jit(program).lower(sets).compile()
    except ValueError as error:
        raise NotOfferedError(refusal(error, case)) from error
    ms = measure(lambda: jax.block_until_ready(compiled(sets)), per=count)
    return Measurement(what, ms, {"bf16": flops}, 0 if isinstance(case, Chunked) else case.bytes)


def _rotation(smoke: bool) -> Measurement:
    """As in `streaming.step.denoise_chunk`."""
    config = preset("tiny" if smoke else "pikastream_9b")
    dit, slots = config.dit, (1 + config.stream.window) * config.tokens_per_frame
    keys = jax.random.normal(jax.random.key(0), (dit.blocks, 1, slots, dit.heads, dit.head_dim), jnp.bfloat16)

    def turn(keys, ring_count):
        places = grid_positions(slot_times(config, ring_count), *config.token_grid)
        return rotate(keys, rope_tables(*places, dit.head_dim))

    arguments = keys, jnp.array([config.stream.window], jnp.int32)
    compiled = jax.jit(turn).lower(*arguments).compile()
    ms = measure(lambda: jax.block_until_ready(compiled(*arguments)))
    return Measurement("all layers' cached keys turned to their places, once per chunk", ms, bytes=2 * keys.nbytes)


def jobs(smoke: bool) -> list[Job]:
    """One process; a row that fails gets the next ones a new one."""
    benches = [Bench("kernel/rotate_9b", functools.partial(_rotation, smoke))]
    for name, case in (_SMALL if smoke else _REAL).items():
        for impl in IMPLEMENTATIONS:
            directions = ("forward", "backward") if isinstance(case, Chunked) else ("forward",)
            requires = tuple(row_name(case.kernel, impl, direction) for direction in directions) if impl == "mosaic" else ()
            benches.append(
                Bench(f"kernel/{name}/{impl}", functools.partial(_time, case, impl, smoke), seconds=6, requires=requires)
            )
    return [Job("kernels", tuple(benches))]
