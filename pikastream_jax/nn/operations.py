"""Counts the matrix products of a program, from its jaxpr: what a floor for its time, and the use of a card, are computed from."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def matrix_operations(fn: Callable, *args: Any) -> int:
    """Floating-point operations (a multiplication and an addition are two) of all matrix products and convolutions of `fn(*args)`.

    What the program does is counted: a forward pass that a backward pass repeats (`jax.checkpoint`) counts twice. Attention counts where it is written as products, so trace with `attention="xla"`. Of the branches of a condition the largest counts.

    Args:
      args: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: the program holds a loop whose length is data.
    """
    return count_products(jax.make_jaxpr(fn)(*args).jaxpr)


def count_products(jaxpr: core.Jaxpr) -> int:
    """`matrix_operations` of a program that is traced already.

    Raises:
      ValueError: the program holds a loop whose length is data.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            _, inputs, *window = params["dimension_numbers"].rhs_spec
            taps = kernel[inputs] * math.prod(kernel[axis] for axis in window)
            zeros = math.prod(params["lhs_dilation"])  # between the inputs of a transposed convolution
            total += 2 * math.prod(equation.outvars[0].aval.shape) * taps // zeros
        elif name == "while":
            raise ValueError("matrix_operations: a while loop has no length that could be counted: use lax.scan")
        elif name == "scan":
            total += params["length"] * count_products(params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(count_products(branch.jaxpr) for branch in params["branches"])
        else:
            for value in params.values():
                inner = getattr(value, "jaxpr", value)
                if isinstance(inner, core.Jaxpr):
                    total += count_products(inner)
    return total
