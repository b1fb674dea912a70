"""Attention over a whole sequence with the chunk-causal, windowed visibility that inference has: the training path.

`impl="xla"` is the definition; it makes a frames x frames mask and tokens x tokens logits. `impl="mosaic"` are the kernels of
`chunked_attention_mosaic.py`, which make neither; right on an H200 but not timed, so "auto" is "xla" everywhere until a run has shown them
faster. There is no "cudnn": cuDNN can tell this visibility only by a tokens x tokens bias, and with one it takes two to
three times the time of a kernel with bounds (benchmark figures of tokamax for an H100).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels._common import attention, check_implementation

IMPLEMENTATIONS = ("auto", "xla", "mosaic")


def frame_visibility(chunk_ids: Int[Array, "b f"], *, window: int, copies: int = 1) -> Bool[Array, "b cf cf"]:
    """Which latent frame may see which.

    A frame sees its own chunk (of its own copy) and, of the context (the first copy), the `window` frames before its chunk.

    Args:
      chunk_ids: the chunk of every latent frame, non-decreasing; all equal means bidirectional.
      window: latent frames before the chunk that are visible.
      copies: 1, or 2 for [context copy, query copy] (recipes: causal adaptation).
    """
    frames = chunk_ids.shape[1]
    index = jnp.arange(frames)
    same = chunk_ids[:, :, None] == chunk_ids[:, None, :]
    start = jnp.argmax(same, axis=2)  # first frame of every frame's chunk
    past = (index[None, None, :] < start[:, :, None]) & (index[None, None, :] >= start[:, :, None] - window)
    if copies == 1:
        return same | past
    nothing = jnp.zeros_like(same)
    context = jnp.concatenate([same | past, nothing], axis=2)
    query = jnp.concatenate([past, same], axis=2)
    return jnp.concatenate([context, query], axis=1)


def chunked_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n g d"],
    v: Float[Array, "b n g d"],
    *,
    chunk_ids: Int[Array, "b f"],
    window: int,
    copies: int = 1,
    fixed: tuple[Float[Array, "b n h d"], Float[Array, "b m g d"], Float[Array, "b m g d"]] | None = None,
    impl: str = "auto",
) -> Float[Array, "b n h d"]:
    """Whole-sequence attention: what `ring_attention` computes chunk by chunk.

    Args:
      q, k, v: all tokens, frame by frame (n = copies x f x tokens per frame), rotated to their places in the sequence.
      chunk_ids, window, copies: see `frame_visibility`.
      fixed: (queries, keys, values) for rows that every query sees at a fixed distance, the reference: the same queries, rotated
        relative to their own chunk, since one absolute rotation cannot hold a fixed distance to every chunk.
      impl: "auto", "xla" or "mosaic" (NVIDIA Hopper; bfloat16, d 64 or 128).

    Raises:
      ValueError: an unknown `impl`, n is not a multiple of copies x f, or the kernels do not take these arrays.
    """
    if impl == "cudnn":
        raise ValueError("chunked_attention: cuDNN has no form of this visibility without a mask of all tokens; choose 'mosaic' or 'xla'")
    check_implementation("chunked_attention", impl, IMPLEMENTATIONS)
    frames = chunk_ids.shape[1] * copies
    n = q.shape[1]
    if n % frames:
        raise ValueError(f"chunked_attention: {n} tokens are not a multiple of {frames} latent frames")
    if impl == "mosaic":
        # Here, so that whoever does without the kernels does not import a GPU's compiler.
        from pallas_kernels._mosaic import check_limits
        from pallas_kernels.chunked_attention_mosaic import mosaic_chunked_attention

        check_limits("chunked_attention", q, k, v, *(fixed or ()))
        return mosaic_chunked_attention(q, k, v, fixed or (), chunk_ids, window=window, copies=copies)
    tokens = n // frames
    visible = frame_visibility(chunk_ids, window=window, copies=copies)
    visible = jnp.repeat(jnp.repeat(visible, tokens, axis=1), tokens, axis=2)
    parts = [(q, k, v, visible)]
    if fixed is not None:
        parts.append((*fixed, None))
    return attention(*parts)
