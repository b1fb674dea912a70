"""Matrix products in 8-bit floating point (e4m3), for inference.

Weights are stored [out, in] with one scale per output channel, activations are scaled per token as they come, and both float32 scales are
applied to the result: the form that XLA hands to cuBLASLt's fp8 product without transposing the weight (openxla, gemm_rewriter). The sum is
taken in float32 and leaves the product in the tokens' dtype: as bfloat16 it is off by 2^-9 at most, where rounding the factors to e4m3 costs
2^-4 each, and half the bytes of float32 pass between the product and what follows it.
Source of the number format: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

E4M3_MAX = 448.0  # largest finite value of float8_e4m3fn
_TINY = 1e-12  # a token or channel of zeros has scale _TINY instead of 0


def quantise(x: Float[Array, "*b d"]) -> tuple[Float[Array, "*b d"], Float[Array, "*b 1"]]:
    """x = values * scale, values in e4m3 with one float32 scale per row of the last axis."""
    x32 = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x32), axis=-1, keepdims=True), _TINY) / E4M3_MAX
    return (x32 / scale).astype(jnp.float8_e4m3fn), scale


class Float8Linear(nnx.Module):
    """An `nnx.Linear` whose product is done in e4m3."""

    def __init__(self, linear: nnx.Linear):
        kernel, scale = quantise(linear.kernel[...].T)
        self.kernel = nnx.Param(kernel)  # [out, in], e4m3
        self.scale = nnx.Param(scale[:, 0])  # [out], float32
        self.bias = linear.bias

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        values, scale = quantise(x)

        def product(values, kernel, dtype=x.dtype):
            contracted = (((values.ndim - 1,), (1,)), ((), ()))
            return jax.lax.dot_general(values, kernel, contracted, preferred_element_type=dtype)

        def emulated(values, kernel):
            return product(values.astype(jnp.float32), kernel.astype(jnp.float32), jnp.float32).astype(x.dtype)

        # Products of two e4m3 numbers are exact in float32, so where there is no fp8 unit the same sum is taken of float32 copies.
        out = jax.lax.platform_dependent(values, self.kernel[...], cuda=product, default=emulated)
        return (out.astype(jnp.float32) * scale * self.scale[...] + self.bias[...]).astype(x.dtype)
