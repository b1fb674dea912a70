"""cuDNN's fused attention: what it takes, and one softmax over two calls of it."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MOST_HEAD_DIM = 128  # on every GPU that has the fused attention; 256 on Hopper only


def unsupported(q: Array, *others: Array) -> str | None:
    """Why cuDNN cannot take these arrays [..., heads, head dim], queries first, as words to follow "impl 'cudnn'"; None if it can."""
    for x in (q, *others):
        if x.dtype not in (jnp.bfloat16, jnp.float16) or x.dtype != q.dtype:
            return f"takes bfloat16 or float16 arrays, all of one dtype, not {x.dtype}; cast them or choose impl 'xla'"
    if q.shape[-1] % 8 or q.shape[-1] > _MOST_HEAD_DIM:
        return f"takes a head dim that is a multiple of 8, at most {_MOST_HEAD_DIM}, not {q.shape[-1]}; choose impl 'xla'"
    return None


def check_supported(kernel: str, q: Array, *others: Array) -> None:
    """Raises ValueError where `unsupported` has a reason."""
    if reason := unsupported(q, *others):
        raise ValueError(f"{kernel}: impl 'cudnn' {reason}")


def attend(
    q: Float[Array, "b t h d"], k: Float[Array, "b s g d"], v: Float[Array, "b s g d"], valid: Int[Array, "b"]
) -> tuple[Float[Array, "b t h d"], Float[Array, "b t h"]]:
    """Attention over the first `valid` keys (at least 1) and the logarithm of each query's sum of exponentials, float32.

    `jax.nn.dot_product_attention` would round that logarithm to the dtype of q: 2% of a weight in bfloat16, where it is about 10. So
    the function below it is called (the same in jax 0.10.2 and 0.11.2: `jax/_src/cudnn/fused_attention_stablehlo.py`).
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    queries = jnp.full(q.shape[:1], q.shape[1], jnp.int32)
    out, log_sum = fused.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=queries,
        kv_seqlen=valid.astype(jnp.int32),
        scale=q.shape[-1] ** -0.5,
        mask_type=fused.MaskType.PADDING,
        return_residual=True,
    )
    return out, log_sum.swapaxes(1, 2)


def attend_two(q: Array, first: tuple[Array, Array, Array], second: tuple[Array, Array, Array]) -> Float[Array, "b t h d"]:
    """One softmax over two parts (k, v, valid), of which only the second may have no valid key in some row: it then weighs exactly 0."""
    out, log_sum = attend(q, *first)
    k, v, valid = second
    more, log_more = attend(q, k, v, jnp.maximum(valid, 1))
    seen = (valid > 0)[:, None, None]
    share = jnp.where(seen, jax.nn.sigmoid(log_more - log_sum), 0.0)[..., None]
    merged = out + share * (more.astype(jnp.float32) - out)
    return jnp.where(seen[..., None], merged, out).astype(q.dtype)


def attend_groups(
    q: Float[Array, "n t h d"], k: Float[Array, "n s g d"], v: Float[Array, "n s g d"], valid: Int[Array, "n"] | None = None
) -> Float[Array, "n t h d"]:
    """Attention over the first `valid` keys (at least 1), or all: with cuDNN's own gradients."""
    (n, t), a = q.shape[:2], k.shape[1]
    if a % 2 and valid is None:
        valid = jnp.full(n, a)
    # Its gradients take even lengths alone (seen on an H200: "Unsupported sequence length Q 50, KV 5").
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    run = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return run(q, k, v, key_value_seq_lengths=None if valid is None else valid.astype(jnp.int32))[:, :t]
