"""The training attention on NVIDIA Hopper, forward and backward (Mosaic GPU). Right on an H200 (`benchmarks/results`), not timed.

A block of two compute warpgroups takes 128 neighbouring tokens of one head, 64 each; a third warpgroup fetches what they are multiplied with,
128 keys or 64 queries at a time, ahead of them. In the forward kernel one compute warpgroup has the tensor cores while the other is in its
softmax (the schedule of FlashAttention-3, arXiv 2407.08608, and of jax's own `pallas/ops/gpu/attention_mgpu.py`). The backward pass computes
the softmax weights again from the saved log-sum-exp, once for the gradient of the queries and once for those of keys and values, so that
nothing is added up in global memory (FlashAttention-2, arXiv 2307.08691).

Visibility comes as ranges (`chunked_attention_ranges.py`), never as a mask. Ways to cut the tokens into tiles:
- tiles that end with their frame: all bounds of a tile are single numbers, but 390 tokens need four tiles of 128: 31% idle rows;
- tiles that end with their chunk: less waste, but chunks are traced, and a store cannot be clipped at a traced place;
- tiles that straddle frames, as here: about 1% idle rows at 9B. A tile walks over the union of its tokens' ranges; only where a bound cuts
  through a step are numbers compared with every token's own bounds. Keys are cut into steps from where a range begins, rounded down to 8.

The fixed part is one more range of the forward kernel, whose queries, keys and values lie in other arrays: one softmax, nothing to merge. (Two
launches merged by their log-sum-exp would write and read the output more often.) In the backward pass it shares only the log-sum-exp and
delta with the chunked part, and each of the two kernels runs once for either.

Limits: bfloat16, heads of 64 or 128. Operands are fetched in rows of 8, so token counts that are no multiple of 8 are padded, which copies the
inputs: with 390 tokens to a frame and two copies an even number of latent frames needs no padding.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.chunked_attention_mosaic_backward import key_value_gradients, query_gradient
from pallas_kernels.chunked_attention_mosaic_forward import forward
from pallas_kernels.chunked_attention_mosaic_tiles import TILE
from pallas_kernels.chunked_attention_ranges import (
    ALIGNMENT,
    full_range,
    joined,
    seeing_frames,
    token_ranges,
    visible_frames,
)

Fixed = tuple[Float[Array, "b n h d"], Float[Array, "b m g d"], Float[Array, "b m g d"]] | tuple[()]


@functools.partial(jax.jit, static_argnames=("window", "copies"))
def mosaic_chunked_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n g d"],
    v: Float[Array, "b n g d"],
    fixed: Fixed,
    chunk_ids: Int[Array, "b f"],
    *,
    window: int,
    copies: int,
) -> Float[Array, "b n h d"]:
    """`chunked_attention` with these kernels; `fixed` is () where there is none. Jitted, so that many layers lower it once."""
    n = q.shape[1]
    tokens = n // (copies * chunk_ids.shape[1])
    lengths = (tokens, fixed[1].shape[1] if fixed else 0)
    q, k, v, *fixed = (
        jnp.pad(x, [(0, 0), (0, -x.shape[1] % ALIGNMENT), (0, 0), (0, 0)]) if x.shape[1] % ALIGNMENT else x for x in (q, k, v, *fixed)
    )
    return _attention(q, k, v, tuple(fixed), chunk_ids, lengths, window, copies)[:, :n]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, fixed, chunk_ids, lengths, window, copies):
    """Arguments padded to whole rows of 8; `lengths` are the tokens of a frame and those of the fixed part, without padding."""
    return _attention_forward(q, k, v, fixed, chunk_ids, lengths, window, copies)[0]


def _attention_forward(q, k, v, fixed, chunk_ids, lengths, window, copies):
    tokens, fixed_tokens = lengths
    ranges = token_ranges(visible_frames(chunk_ids, window=window, copies=copies), tokens=tokens, tile=TILE)
    if fixed:
        n = tokens * copies * chunk_ids.shape[1]
        ranges = joined(ranges, full_range(batch=q.shape[0], tokens=n, others=fixed_tokens, tile=TILE))
    out, lse = forward(q, k, v, fixed, ranges)
    return out, (q, k, v, fixed, chunk_ids, out, lse)


def _attention_backward(lengths, window, copies, saved, d_out):
    q, k, v, fixed, chunk_ids, out, lse = saved
    tokens, fixed_tokens = lengths
    n = tokens * copies * chunk_ids.shape[1]
    delta = jnp.einsum("bnhd,bnhd->bhn", out, d_out, preferred_element_type=jnp.float32)
    delta = jnp.pad(delta, [(0, 0), (0, 0), (0, lse.shape[2] - delta.shape[2])])

    def gradients(q, k, v, of_queries, of_keys):
        dq = query_gradient(q, k, v, d_out, lse, delta, of_queries)
        return dq, *key_value_gradients(q, k, v, d_out, lse, delta, of_keys)

    dq, dk, dv = gradients(
        q,
        k,
        v,
        token_ranges(visible_frames(chunk_ids, window=window, copies=copies), tokens=tokens, tile=TILE),
        token_ranges(seeing_frames(chunk_ids, window=window, copies=copies), tokens=tokens, tile=TILE),
    )
    d_fixed = ()
    if fixed:
        batch = q.shape[0]
        d_fixed = gradients(
            *fixed,
            full_range(batch=batch, tokens=n, others=fixed_tokens, tile=TILE),
            full_range(batch=batch, tokens=fixed_tokens, others=n, tile=TILE),
        )
    return dq, dk, dv, d_fixed, None


_attention.defvjp(_attention_forward, _attention_backward)
