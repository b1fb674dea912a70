import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_stage import toy_stage

from pikastream_jax.training import checkpoint
from pikastream_jax.training.checkpoint import Checkpoints, load_weights
from pikastream_jax.training.loop import run
from pikastream_jax.weights import safetensors_io


def test_round_trip_keeps_every_bit_and_the_record(tmp_path):
    state = {"a": {0: jnp.array([0.1, -0.0, 1e-38]), 1: jnp.arange(4)}, "half": jnp.ones((2, 3), jnp.bfloat16) / 3}
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step is None
    checkpoints.save(7, state, {"loss": 0.1 + 0.2, "names": ["x"]})
    reopened = Checkpoints(tmp_path)
    assert reopened.latest_step == 7
    assert reopened.record(7) == {"loss": 0.1 + 0.2, "names": ["x"]}
    restored = reopened.restore(7, jax.eval_shape(lambda: state))
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert got.dtype == want.dtype
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_misfit_names_every_difference(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"kernel": jnp.ones((2, 3)), "old": jnp.ones(1)}, {})
    with pytest.raises(ValueError, match=r"missing new; unexpected old; kernel is \(2, 3\), expected \(2, 4\)"):
        checkpoints.restore(1, {"kernel": jnp.ones((2, 4)), "new": jnp.ones(1)})


def test_load_weights_takes_the_average_of_a_run_folder_or_a_file(tmp_path, monkeypatch):
    state = run(toy_stage(), tmp_path / "run", steps=5)
    loaded = load_weights(tmp_path / "run")
    assert jax.tree.structure(loaded) == jax.tree.structure(state.ema)
    jax.tree.map(np.testing.assert_array_equal, loaded, state.ema)
    assert any(
        bool((a != b).any()) for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state.params), strict=True)
    )
    safetensors_io.save(tmp_path / "w.safetensors", state.params, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / "w.safetensors"), state.params)
    monkeypatch.setattr(sys, "argv", ["checkpoint", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "average.safetensors")])
    checkpoint.main()
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / "average.safetensors"), state.ema)


def test_reading_leaves_a_save_under_way_alone(tmp_path):
    """orbax's writer clears away temporary folders when it starts; a reader beside it must not."""
    run(toy_stage(), tmp_path, steps=5)
    (saving,) = (tmp_path / "checkpoints").iterdir()
    unfinished = saving.with_name("10.orbax-checkpoint-tmp")
    unfinished.mkdir()
    load_weights(tmp_path)
    assert unfinished.exists()
    run(toy_stage(), tmp_path, steps=1)
    assert not unfinished.exists()


def test_load_weights_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        load_weights(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        load_weights(tmp_path)
