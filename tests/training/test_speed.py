import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.training import speed
from pikastream_jax.training.speed import peak_operations, speed_figures, update_operations


def test_figures_by_hand(monkeypatch):
    assert speed_figures(2.5, None, None) == {"updates_per_second": 2.5}
    found = speed_figures(2.0, 96, 3 * 10**12)
    assert found == {"updates_per_second": 2.0, "frames_per_second": 192.0, "tera_operations_per_second": 6.0}
    monkeypatch.setattr(speed, "peak_operations", lambda kind: 100e12)
    np.testing.assert_allclose(speed_figures(2.0, 96, 3 * 10**12)["utilisation"], 0.06 / jax.device_count())


@pytest.mark.parametrize(
    "kind, peak",
    [("NVIDIA H200", 989.4e12), ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None)],
)
def test_peaks(kind, peak):
    assert peak_operations(kind) == peak


def test_an_update_is_traced_once_for_its_count_and_its_program():
    traces = []

    @jax.jit
    def update(x, w):
        traces.append(1)
        return x @ w

    x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert update_operations(update.trace(x, w)) == 2 * 3 * 4 * 5
    update(x, w)
    assert len(traces) == 1


def test_what_cannot_be_counted_is_left_out():
    loop = jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x))
    assert update_operations(loop.trace(jnp.ones(2))) is None
