import functools

import jax
import jax.numpy as jnp
import pytest

from pikastream_jax.nn.operations import matrix_operations


def test_loops_conditions_and_inner_functions_count():
    def program(x, w):
        x, _ = jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, w), None), x, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    assert matrix_operations(program, jnp.ones((3, 4)), jnp.ones((4, 4))) == (5 + 2) * 2 * 3 * 4 * 4
    batched = functools.partial(jnp.einsum, "bij,bkj->bik")
    assert matrix_operations(batched, jnp.ones((2, 3, 4)), jnp.ones((2, 5, 4))) == 2 * 2 * 3 * 5 * 4
    with pytest.raises(ValueError, match="while loop"):
        matrix_operations(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), jnp.ones((2, 2)))


def test_convolutions_count_as_the_products_they_are():
    """Pictures [2, 8, 8, 3], kernel [3, 3, 3, 5]: every output pixel is a product of 27 by 5."""
    convolve = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    assert matrix_operations(lambda x, k: convolve(x, k, (1, 1), "SAME"), x, kernel) == 2 * (2 * 8 * 8) * 27 * 5
    assert matrix_operations(lambda x, k: convolve(x, k, (2, 2), "SAME"), x, kernel) == 2 * (2 * 4 * 4) * 27 * 5
    depthwise = functools.partial(convolve, window_strides=(1, 1), padding="SAME", feature_group_count=3)
    assert matrix_operations(depthwise, x, jnp.ones((3, 3, 1, 3))) == 2 * (2 * 8 * 8) * 9 * 3


def test_a_gradient_counts_twice_the_forward_pass_more_and_recomputation_once_more():
    """Of y = x w only with respect to w: one product forward, one back."""
    x, w = jnp.ones((7, 4)), jnp.ones((4, 5))
    once = 2 * 7 * 4 * 5

    def loss(w, f):
        return jnp.sum(jnp.sin(f(x, w)) ** 2)

    assert matrix_operations(jax.grad(functools.partial(loss, f=jnp.matmul)), w) == 2 * once
    assert matrix_operations(jax.grad(lambda w: jax.checkpoint(functools.partial(loss, f=jnp.matmul))(w)), w) == 3 * once
