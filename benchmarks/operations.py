"""Counts the matrix products of a program, from its jaxpr: what a floor for its time is computed from."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def matrix_operations(fn: Callable, *args: Any) -> int:
    """Floating-point operations (a multiplication and an addition are two) of all matrix products of `fn(*args)`.

    Attention counts where it is written as products, so trace with `attention="xla"`. Of the branches of a condition the largest counts.

    Args:
      args: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: the program holds a loop whose length is data.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "while":
            raise ValueError("matrix_operations: a while loop has no length that could be counted: use lax.scan")
        elif name == "scan":
            total += params["length"] * _count(params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        else:
            for value in params.values():
                inner = getattr(value, "jaxpr", value)
                if isinstance(inner, core.Jaxpr):
                    total += _count(inner)
    return total
