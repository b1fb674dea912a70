"""The served programs, compiled for an H200 without one: what they need, what they must not do. `make h200` runs these."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks.deviceless import available, compile_kernels, compile_program
from benchmarks.h200 import GIB, KERNELS, MIB, compile_decoder, compile_step
from configs import preset

pytestmark = [pytest.mark.h200, pytest.mark.skipif(not available(), reason="the CUDA compiler's wheels are absent: make h200")]
CARD = 80 * 10**9  # bytes of the smallest card that the preset is made for


@functools.cache
def step(precision):
    return compile_step(preset("pikastream_9b", attention="mosaic", precision=precision))


def test_the_tool_sees_memory_copies_and_aliases():
    """A program whose figures are known: one donated argument kept in place, one transposed copy, one product."""
    x = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
    program = compile_program(lambda a, b: (a + 1, b.T), x, x, donate_argnums=0)
    assert program.arguments == 2 * 2**21 and program.aliased == 2**21 and program.outputs >= 2 * 2**21
    assert program.peak >= 3 * 2**21
    copied = compile_program(lambda a: jax.lax.optimization_barrier(a).at[0, 0].set(1.0), x)  # not donated: must be copied
    assert any("[1024,512]" in name for name in copied.copies(2**20)) and not copied.copies(2**22)
    kept = compile_program(lambda a: a.at[0, 0].set(1.0), x, donate_argnums=0)
    assert not kept.copies(2**20) and kept.aliased == 2**21


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
def test_the_9b_step_fits_an_80_gb_card(precision):
    program = step(precision)
    assert program.peak < 0.5 * CARD, "weights, two copies of the keys, and little else"
    assert program.temporaries < 3 * GIB
    caches = 2 * 30 * 13 * 390 * 4096 * 2
    assert program.aliased >= caches, "the donated cache stays where it is"
    assert all("[12,1,3120,4,64]" in name for name in program.copies(16 * MIB)), "but for FlashVAE's window, 19 MB"
    assert "while(" not in program.text, "a loop would not be replayed as one graph"


@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_spills(name):
    kernel, *args = KERNELS[name]
    found = compile_kernels(kernel, *args)
    assert found and all(0 < one.registers <= 255 and one.spilled == 0 for one in found), found


def test_float8_products_are_float8_products():
    assert step("float8").text.count("__cublas$lt$matmul$f8") >= 30 * 8 * 4, "eight to a block and step"


def test_the_decoder_at_480p_takes_less_than_the_published_memory():
    program = compile_decoder(preset("pikastream_9b", attention="mosaic"), 480, 832)
    assert program.peak < 1.1e9
