"""Small layers and the functional view of a module."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Params = dict[Any, Any]  # a module's parameters as nested plain dicts


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...]).astype(x.dtype)


def modulated_layer_norm(
    x: Float[Array, "*b d"], shift: Float[Array, "*b #d"], scale: Float[Array, "*b #d"], eps: float = 1e-6
) -> Float[Array, "*b d"]:
    """AdaLN: LayerNorm without parameters, times 1 + scale, plus shift; in float32, rounded once to the dtype of x."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * (1 + scale) + shift).astype(x.dtype)


class MLP(nnx.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, dim_in: int, hidden: int, dim_out: int, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(dim_in, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, dim_out, rngs=rngs)

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


@dataclasses.dataclass(frozen=True)
class Functional:
    """A module's graph apart from its parameters, so that jitted functions take plain dicts of arrays.

    `bind(params)` gives back the module, to be used inside the trace only.
    """

    graph: nnx.GraphDef
    abstract: Params  # shapes and dtypes

    def bind(self, params: Params) -> Any:
        return nnx.merge(self.graph, params)


class _ShapesOnly:
    """Stands in for `nnx.Rngs` where no number is ever drawn: counting keys in a trace takes time with the square of their number."""

    params = property(lambda self: self)

    def __call__(self) -> Array:
        return jax.random.key(0)

    def normal(self, shape: tuple[int, ...]) -> Array:
        return jnp.zeros(shape)


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """The functional view of `build(rngs)`, without allocating a parameter."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(_ShapesOnly())))
    return Functional(graph, nnx.to_pure_dict(state))


def linear_of(kernel: Float[Array, "i o"], bias: Float[Array, "o"]) -> nnx.Linear:
    """A linear layer of given weights."""
    linear = nnx.Linear(*kernel.shape, kernel_init=nnx.initializers.zeros_init(), rngs=_ShapesOnly())
    linear.kernel, linear.bias = nnx.Param(kernel), nnx.Param(bias)
    return linear


def initial_params(build: Callable[[nnx.Rngs], nnx.Module], key: Array) -> Params:
    """Freshly initialised parameters of `build(rngs)`."""

    def init(key):
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    return jax.jit(init)(key)


def parameter_count(params: Params) -> int:
    """Number of parameters (works on shapes too)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
