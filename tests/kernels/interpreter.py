"""Runs the Mosaic kernels themselves on a CPU: jax 0.11's Mosaic GPU interpreter, with the one rule that it lacks.

It simulates warpgroups (as threads), barriers, TMA copies with their clipping, shared memory and wgmma in float32. What it does not see:
the layout of bytes in shared memory, registers, and that wgmma and TMA run on while the program goes on.
"""

import contextlib

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _mosaic

AVAILABLE = jax.version.__version_info__[:2] == (0, 11)  # 0.10 has no public interpreter, and the rule below is written for 0.11

needed = pytest.mark.skipif(not AVAILABLE, reason=f"jax {jax.__version__} cannot interpret these kernels; 0.11 can")


def _multiply_from_registers(callbacks, interpreted):
    """wgmma whose left side is a value in registers, which the interpreter of 0.11 takes for a buffer's name."""

    def wgmma(*, a_allocation_key_as_array, **arguments):
        left = np.asarray(a_allocation_key_as_array)
        if left.ndim == 1:
            return interpreted(a_allocation_key_as_array=a_allocation_key_as_array, **arguments)
        memory, thread = callbacks._get_shared_memory(), arguments["thread"]

        def buffer(name):
            key = callbacks.HostAllocationKey.from_array(arguments[f"{name}_allocation_key_as_array"])
            transforms = jax.tree.map(int, callbacks._remove_noop_transforms(arguments[f"{name}_transforms"]))
            place = key, memory.access(key, transforms)
            return place, memory.get_buffer_content(*place, thread)[0]

        (place, accumulator), (_, right) = buffer("acc"), buffer("b")
        result = accumulator + np.matmul(left, right, dtype=accumulator.dtype)
        memory.store_buffer_content(*place, result, thread)
        return arguments["token"]

    return callbacks.fail_on_exception(wgmma)


def _plain_tiles(*shape):
    *leading, rows, columns = shape
    return plgpu.SMEM((*leading, columns // _mosaic.CHUNK, rows, _mosaic.CHUNK), jnp.bfloat16)


@contextlib.contextmanager
def interpreted_kernels():
    """Mosaic kernels inside run in the interpreter; its memory starts as NaN. Yields a function that says whether threads raced."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call

    with pytest.MonkeyPatch.context() as patch:
        # Its buffers are plain arrays: no swizzle, no blocks.
        patch.setattr(_mosaic, "tiles", _plain_tiles)
        patch.setattr(_mosaic, "lines", lambda chunk: chunk)
        patch.setattr(_mosaic, "matrix", lambda chunk: chunk)
        patch.setattr(gpu_callbacks, "wgmma", _multiply_from_registers(gpu_callbacks, gpu_callbacks.wgmma))
        jax.clear_caches()
        try:
            with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")):
                yield lambda: interpret_pallas_call.get_races().races_found
        finally:
            interpret_pallas_call.reset_gpu_interpret_mode_state()
            jax.clear_caches()
