"""Runs Mosaic GPU kernels on the CPU, in the interpreter of jax 0.11, with the one rule it lacks that attention needs.

The interpreter simulates warpgroups as threads, shared memory, TMA with its clipping, and barriers; it knows nothing of layouts or time.
"""

import contextlib

import jax
import pytest

SUPPORTED = jax.__version_info__ >= (0, 11)
needs_interpreter = pytest.mark.skipif(not SUPPORTED, reason="the interpreter of jax < 0.11 has no transposed operands")


@contextlib.contextmanager
def interpreted():
    """Kernels traced inside run in the interpreter, where memory that nobody wrote reads as NaN.

    Yields a function that says whether the kernels run so far had races.
    """
    from jax._src.pallas.mosaic_gpu import core
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
    from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def wgmma(self, eqn, token, get_invals):
        """A left operand in registers is put into a buffer of its own, where the interpreter's rule looks for it."""
        if hasattr(eqn.invars[1].aval, "inner_aval"):
            return original(self, eqn, token, get_invals)
        values = list(get_invals())
        token, request = gpu_callbacks.call_make_allocation_request_array(
            token=token,
            compute_unit=self.thread,
            memory_space_id=shared_memory.get_memory_space_idx(core.MemorySpace.REGS),
            initial_ref_count=1,
        )
        where = dict(mesh_location=self.mesh_location, thread=self.thread, source_info=eqn.source_info)
        token, key = gpu_callbacks.call_allocate_buffer(token=token, allocation_request_as_array=request, value=values[1], **where)
        values[1] = key
        token, out = original(self, eqn, token, lambda: values)
        return gpu_callbacks.call_deallocate_buffer(token=token, allocation_key_as_array=key, **where), out

    original = JaxprInterpreter._interpret_wgmma_ref_p
    JaxprInterpreter._interpret_wgmma_ref_p = wgmma
    jax.clear_caches()  # a kernel traced before would not be interpreted, and the reverse
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield lambda: gpu_callbacks.get_races().races_found
    finally:
        JaxprInterpreter._interpret_wgmma_ref_p = original
        gpu_callbacks.reset_gpu_interpret_mode_state()
        jax.clear_caches()
