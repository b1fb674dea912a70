import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_stage import full_disk, toy_stage

from pikastream_jax.training import checkpoint
from pikastream_jax.training.checkpoint import Checkpoints, load_weights
from pikastream_jax.training.loop import run
from pikastream_jax.weights import safetensors_io


def test_round_trip_keeps_every_bit_and_the_record(tmp_path):
    state = {"a": {0: jnp.array([0.1, -0.0, 1e-38]), 1: jnp.arange(4)}, "half": jnp.ones((2, 3), jnp.bfloat16) / 3}
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step is None
    checkpoints.save(7, state, {"loss": 0.1 + 0.2, "names": ["x"]})
    checkpoints.wait()
    assert checkpoints.latest_step == 7
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
    checkpoints.wait()
    with pytest.raises(ValueError, match=r"missing new; unexpected old; kernel is \(2, 3\), expected \(2, 4\)"):
        checkpoints.restore(1, {"kernel": jnp.ones((2, 4)), "new": jnp.ones(1)})


def test_a_save_under_way_holds_the_state_of_its_step_though_training_goes_on(tmp_path):
    """The buffers that are being written are donated to the next updates, which overwrite them in place where nothing holds them."""
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"a": jnp.zeros(1_000_000), "b": jnp.zeros((300, 7))}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {})
    assert checkpoints.latest_step is None, "it counts once it is whole"
    for _ in range(30):
        state = advance(state)
    checkpoints.save(33, state, {})
    state = advance(state)
    checkpoints.close()
    reopened = Checkpoints(tmp_path)
    for step, value in ((3, 0), (33, 30)):
        for leaf in jax.tree.leaves(reopened.restore(step, jax.eval_shape(lambda: state))):
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, value))


def test_a_full_disk_is_one_line_and_spoils_nothing(tmp_path, caplog):
    state = {"w": jax.random.normal(jax.random.key(0), (50_000,))}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {"n": 1})
    checkpoints.wait()
    with full_disk(20_000):
        for wait in (checkpoints.wait, checkpoints.close):
            checkpoints.save(2, jax.tree.map(jnp.negative, state), {"n": 2})
            with pytest.raises(OSError, match=r"cannot write the checkpoint .*2 \(.*[Ff]ile too large.*/1 is whole: make room") as error:
                wait()
            assert len(str(error.value).splitlines()) == 1
            assert checkpoints.latest_step == 1
    assert not caplog.records, "orbax's own pages are kept out of the log"
    reopened = Checkpoints(tmp_path, keep=1)
    assert (reopened.latest_step, reopened.record(1)) == (1, {"n": 1})
    np.testing.assert_array_equal(reopened.restore(1, jax.eval_shape(lambda: state))["w"], state["w"])
    reopened.save(2, state, {})
    reopened.close()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_torn_checkpoint_is_one_line(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (50_000,))}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.close()
    for file in (tmp_path / "1" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ValueError, match=r"checkpoint .*1 cannot be read \(.*\): copy it again, or remove that folder"):
        Checkpoints(tmp_path).restore(1, jax.eval_shape(lambda: state))


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_stay_as_asked(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step in range(1, 6):
        checkpoints.save(step, {"w": jnp.full(3, step)}, {})
    checkpoints.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == list(range(6 - keep, 6))
    with pytest.raises(ValueError, match="keep must be at least 1 checkpoint, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory: .*file/checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints")


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


def test_one_model_of_a_file_that_streams_is_taken(tmp_path):
    denoiser, flash_vae = {"weight": jnp.arange(3.0)}, {"denoiser": jnp.ones(2)}
    safetensors_io.save(tmp_path / "streams.safetensors", {"denoiser": denoiser, "flash_vae": flash_vae}, {"pikastream": "{}"})
    assert load_weights(tmp_path / "streams.safetensors", "denoiser")["weight"].tolist() == [0, 1, 2]
    assert set(load_weights(tmp_path / "streams.safetensors", "flash_vae")) == {"denoiser"}
    assert set(load_weights(tmp_path / "streams.safetensors")) == {"denoiser", "flash_vae"}
    safetensors_io.save(tmp_path / "one.safetensors", flash_vae)
    assert set(load_weights(tmp_path / "one.safetensors", "denoiser")) == {"denoiser"}, "a file of one model is that model, whatever its parts are called"


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
