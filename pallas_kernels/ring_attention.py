"""Attention of the current chunk over the rolling cache and itself: the inference path of both models."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _cudnn
from pallas_kernels._common import attention, check_implementation, on_cuda, with_gradients_of

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "mosaic")


def ring_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t g d"],
    v: Float[Array, "b t g d"],
    cache_k: Float[Array, "l b s g d"],
    cache_v: Float[Array, "l b s g d"],
    *,
    layer: int,
    fixed_slots: int,
    fixed_valid: Int[Array, "b"],
    ring_valid: Int[Array, "b"],
    impl: str = "auto",
) -> Float[Array, "b t h d"]:
    """Every query of the chunk sees the chunk's own keys and every valid slot of one layer of the cache.

    Slots [0, fixed_slots) are the fixed rows (reference, then sink), of which the first `fixed_valid` count; the rest is the
    ring, of which the first `ring_valid` slots count. Softmax does not mind order, so a ring needs no unrolling and no mask
    beyond these two lengths.

    Args:
      q: queries of the chunk, rotated to their places.
      k, v: the chunk's own keys (rotated) and values; `g` divides `h`.
      cache_k, cache_v: all layers' caches, keys already rotated relative to this chunk.
      layer: which layer to read.
      fixed_slots: how many slots at the front are fixed rows.
      fixed_valid, ring_valid: valid slots of either part, per batch row; each row may be another session.
      impl: "xla": plain JAX, which defines the others and their gradients. "cudnn": two calls of cuDNN's fused attention, bfloat16 or float16.
        "mosaic": our kernel, which reads the cache in place, bfloat16 and head dim 64 or 128; its check on an H200 did not end in time. "auto":
        on CUDA cuDNN where it takes the arrays, else XLA; never Mosaic, until a committed GPU run has shown it right and faster.

    Raises:
      ValueError: an unknown `impl`, more fixed slots than slots, a layer that is not there, or arrays that an `impl` asked for by name cannot take.
    """
    check_implementation("ring_attention", impl, IMPLEMENTATIONS)
    layers, _, slots = cache_k.shape[:3]
    if not 0 <= layer < layers:
        raise ValueError(f"ring_attention: layer {layer} is outside the cache's {layers} layers")
    if fixed_slots > slots:
        raise ValueError(f"ring_attention: fixed_slots {fixed_slots} exceeds the cache's {slots} slots")
    static = dict(layer=layer, fixed_slots=fixed_slots)
    arrays = (q, k, v, cache_k, cache_v, fixed_valid, ring_valid)

    def xla(*arrays):
        return _xla(*arrays, **static)

    cudnn = with_gradients_of(xla, lambda *arrays: _two_calls(*arrays, **static))
    if impl == "cudnn":
        _cudnn.check_supported("ring_attention", *arrays[:5])
        return cudnn(*arrays)
    if impl == "mosaic":
        # Here, so that whoever does without the kernels does not import a GPU's compiler.
        from pallas_kernels import ring_attention_mosaic

        return with_gradients_of(xla, lambda *arrays: ring_attention_mosaic.attend(*arrays, **static))(*arrays)
    if impl == "xla" or _cudnn.unsupported(*arrays[:5]):
        return xla(*arrays)
    return on_cuda(cudnn, xla, *arrays)


def _xla(q, k, v, cache_k, cache_v, fixed_valid, ring_valid, *, layer, fixed_slots):
    slot = jnp.arange(cache_k.shape[2])
    valid = jnp.where(slot < fixed_slots, slot < fixed_valid[:, None], slot - fixed_slots < ring_valid[:, None])
    return attention((q, cache_k[layer], cache_v[layer], valid[:, None]), (q, k, v, None))


def _two_calls(q, k, v, cache_k, cache_v, fixed_valid, ring_valid, *, layer, fixed_slots):
    """The chunk's own keys with the fixed rows behind them (so that their valid keys are one run, never empty), and the ring."""
    fixed = slice(None, fixed_slots)
    own = jnp.concatenate([k, cache_k[layer, :, fixed]], axis=1), jnp.concatenate([v, cache_v[layer, :, fixed]], axis=1)
    own = *own, k.shape[1] + jnp.clip(fixed_valid, 0, fixed_slots)
    ring_slots = cache_k.shape[2] - fixed_slots
    if not ring_slots:
        return _cudnn.attend(q, *own)[0]
    ring = slice(fixed_slots, None)
    return _cudnn.attend_two(q, own, (cache_k[layer, :, ring], cache_v[layer, :, ring], jnp.clip(ring_valid, 0, ring_slots)))
