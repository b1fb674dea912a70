"""The card's own limits: matrix products in bfloat16 and e4m3 (8192 each way, and the DiT's shapes), and copying in device memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.rows import Bench, Job, Measurement
from benchmarks.timing import measure
from pikastream_jax.nn.float8 import E4M3_MAX

CACHE_BYTES = 128 * 2**20  # twice the L2 of an H200: what is read in turn must be more than that
_E4M3_STD = E4M3_MAX / 4.2  # normal numbers whose largest of about 1e5 just fits


@dataclasses.dataclass(frozen=True)
class Product:
    """[rows, inner] x [inner, columns]."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    def __str__(self) -> str:
        return f"{self.rows}x{self.inner}x{self.columns}"


# The 9B DiT with chunks of 3: query, key and value at once; output; up; down; and the chunk of 1's up.
_SHAPES = (
    Product(8192, 8192, 8192),
    Product(1170, 4096, 12288),
    Product(1170, 4096, 4096),
    Product(1170, 4096, 15360),
    Product(1170, 15360, 4096),
    Product(390, 4096, 15360),
)
_SMALL = (Product(64, 48, 32), Product(24, 16, 48))


def random_e4m3(key: Array, shape: tuple[int, ...]) -> Array:
    """Values that fill the range of e4m3, as quantised weights do."""
    return jnp.clip(jax.random.normal(key, shape) * _E4M3_STD, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)


def sets_beyond_cache(size: int, most: int = 16) -> int:
    """How many sets of `size` bytes are read in turn so that none is found in the L2 cache."""
    return max(1, min(most, math.ceil(CACHE_BYTES / size)))


def _bf16(x: Array, w: Array) -> Array:
    return x @ w


def _fp8(x: Array, w: Array, of_rows: Array, of_columns: Array) -> Array:
    """Float8Linear's product with its scales; `w` is [out, in]."""
    product = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return (product * of_rows * of_columns).astype(jnp.bfloat16)


def _product(shape: Product, kind: str) -> Measurement:
    width = {"bf16": 2, "fp8": 1}[kind]
    moved = width * (shape.rows * shape.inner + shape.inner * shape.columns) + 2 * shape.rows * shape.columns
    count = sets_beyond_cache(moved)
    small = shape.flops < 1e11
    count = max(count, 8) if small else count  # a call's start weighs little against several products

    def draw(key):
        left, right = jax.random.split(key)
        if kind == "bf16":
            return (
                jax.random.normal(left, (shape.rows, shape.inner), jnp.bfloat16),
                jax.random.normal(right, (shape.inner, shape.columns), jnp.bfloat16) * shape.inner**-0.5,
            )
        scales = jax.random.uniform(left, (shape.rows, 1)), jax.random.uniform(right, (shape.columns,))
        return random_e4m3(left, (shape.rows, shape.inner)), random_e4m3(right, (shape.columns, shape.inner)), *scales

    draw = jax.jit(draw)
    sets = [draw(key) for key in jax.random.split(jax.random.key(0), count)]
    multiply = _bf16 if kind == "bf16" else _fp8
    program = jax.jit(lambda sets: [multiply(*arrays) for arrays in sets])
    program = program.lower(sets).compile()

    def run():
        jax.block_until_ready(program(sets))

    ms, again = measure(run, per=count), measure(run, per=count)
    return Measurement(
        f"{count} products {shape} one after another in one program, random data, time of one; float32 sums, bfloat16 results"
        + (", scaled as in Float8Linear" if kind == "fp8" else ""),
        ms,
        {kind: shape.flops},
        moved,
        {"same_again_percent": 100 * abs(again.median / ms.median - 1)},
    )


def _copy(size: int) -> Measurement:
    x = jax.jit(lambda key: jax.random.bits(key, (size // 4,), jnp.uint32))(jax.random.key(0))
    program = jax.jit(lambda x: x ^ jnp.uint32(1)).lower(x).compile()
    ms = measure(lambda: jax.block_until_ready(program(x)))
    return Measurement(f"{size} random bytes read, one bit of each word turned over, written elsewhere", ms, bytes=2 * size)


def jobs(smoke: bool) -> list[Job]:
    """One process, one row for every limit."""
    shapes = _SMALL if smoke else _SHAPES
    benches = [Bench("ceiling/copy", functools.partial(_copy, 2**20 if smoke else 2**31))]
    for shape in shapes:
        for kind in ("bf16", "fp8"):
            benches.append(Bench(f"ceiling/{kind}/{shape}", functools.partial(_product, shape, kind), seconds=4))
    return [Job("ceilings", tuple(benches))]
