"""RoPE: the split of the head, rotation by complex numbers in float64, and dependence on distance alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.nn.ring import ring_ages
from pikastream_jax.nn.rope import axis_split, grid_positions, rope_tables, rotate


@pytest.mark.parametrize(("head_dim", "split"), [(128, (44, 42, 42)), (64, (24, 20, 20)), (24, (8, 8, 8))])
def test_axis_split(head_dim, split):
    assert axis_split(head_dim) == split


def test_rotation_against_complex_numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 2, 24)).astype(np.float32)
    place = np.array([[2.0, -5.0, 30.0]]), np.array([[0.0, 3.0, 1.0]]), np.array([[4.0, 0.0, 2.0]])
    out = np.asarray(rotate(x, rope_tables(*(jnp.asarray(p) for p in place), 24)))
    for token in range(3):
        angles = np.concatenate([place[axis][0, token] * 10_000.0 ** (-np.arange(0, 8, 2) / 8) for axis in range(3)])
        turned = (x[0, token, :, 0::2] + 1j * x[0, token, :, 1::2]) * np.exp(1j * angles)
        np.testing.assert_allclose(out[0, token, :, 0::2], turned.real, atol=1e-5)
        np.testing.assert_allclose(out[0, token, :, 1::2], turned.imag, atol=1e-5)


def test_products_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 1, 24)).astype(np.float32)

    def product(tq, tk):
        tables = [rope_tables(jnp.array([[t]]), jnp.array([[1.0]]), jnp.array([[2.0]]), 24) for t in (tq, tk)]
        return float(jnp.sum(rotate(q, tables[0]) * rotate(k, tables[1])))

    assert product(3.0, 1.0) == pytest.approx(product(103.0, 101.0), abs=1e-4)
    assert product(3.0, 1.0) != pytest.approx(product(3.0, 2.0), abs=1e-3)


def test_grid_positions():
    time, row, column = grid_positions(jnp.array([5.0, 7.0]), 2, 3)
    assert time.tolist() == [5.0] * 6 + [7.0] * 6
    assert row.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert column.tolist() == [0, 1, 2] * 4


def test_ring_ages_by_hand():
    # After 5 writes into 3 slots they hold frames 3, 4, 2; the newest is frame 4.
    assert ring_ages(jnp.array([5]), 3).tolist() == [[2, 1, 3]]
    assert ring_ages(jnp.array([1]), 3)[0, 0] == 1
