"""Cross-attention in which a group of queries (a latent frame, a chunk) sees only its own keys."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _cudnn
from pallas_kernels._common import attention, check_implementation, on_cuda

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "mosaic")


def frame_attention(
    q: Float[Array, "b f t h d"],
    k: Float[Array, "b f a g d"],
    v: Float[Array, "b f a g d"],
    *,
    valid: Int[Array, "b f"] | None = None,
    impl: str = "auto",
) -> Float[Array, "b f t h d"]:
    """Each group's queries against that group's keys: audio frame by frame, text chunk by chunk.

    Args:
      q: queries, `t` to a group.
      k, v: keys and values, `a` to a group.
      valid: how many of the `a` keys count; None means all. A group with none valid averages all its values, whatever q and k are.
      impl: "xla": plain JAX, which defines the others. "cudnn": cuDNN's fused attention, bfloat16 or float16. "mosaic": our kernels, bfloat16
        and head dim 64 or 128; right on an H200 (`benchmarks/results`), not timed: up to 128 keys lie in shared memory at once (gradients too, up to
        64), more stream through it (gradients as XLA's). "auto": on CUDA cuDNN where it takes the arrays, else XLA; never Mosaic,
        until a committed GPU run has shown it faster.

    Raises:
      ValueError: an unknown `impl`, no keys, or arrays that an `impl` asked for by name cannot take.
    """
    check_implementation("frame_attention", impl, IMPLEMENTATIONS)
    a = k.shape[2]
    if a == 0:
        raise ValueError("frame_attention: 0 keys to a group; a group needs at least 1")
    if valid is not None:
        q = jnp.where((valid == 0)[..., None, None, None], 0, q)
        valid = jnp.where(valid == 0, a, valid)
    arrays = (q, k, v) if valid is None else (q, k, v, valid)
    if impl == "cudnn":
        _cudnn.check_supported("frame_attention", q, k, v)
        return _by_frame(_cudnn.attend_groups, *arrays)
    if impl == "mosaic":
        # Here, so that whoever does without the kernels does not import a GPU's compiler.
        from pallas_kernels import frame_attention_mosaic

        return _by_frame(functools.partial(frame_attention_mosaic.attend, _xla), *arrays)
    if impl == "xla" or _cudnn.unsupported(q, k, v):
        return _xla(*arrays)
    return on_cuda(lambda *arrays: _by_frame(_cudnn.attend_groups, *arrays), _xla, *arrays)


def _xla(q, k, v, valid=None):
    visible = None if valid is None else (jnp.arange(k.shape[-3]) < valid[..., None])[..., None, :]
    return attention((q, k, v, visible))


def _by_frame(attend, *arrays):
    """`attend` with batch and frames as one axis."""
    return attend(*(x.reshape(-1, *x.shape[2:]) for x in arrays)).reshape(arrays[0].shape)
