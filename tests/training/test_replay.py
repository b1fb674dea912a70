import json
import os

import jax
import numpy as np
import pytest
from toy_stage import ToyBatches, toy_stage

from pikastream_jax.training.failure import keep_failure, kept_batch, last_failure
from pikastream_jax.training.loop import NonFiniteError, run
from pikastream_jax.training.replay import replay


@pytest.mark.parametrize("first_stretch", [None, 12])
def test_a_bad_batch_is_kept_and_found_again(tmp_path, first_stretch):
    stage = toy_stage(batches=lambda: ToyBatches(nan_at=17))
    if first_stretch:
        run(stage, tmp_path, steps=first_stretch)
    with pytest.raises(NonFiniteError, match="step 18 loss is nan.*kept for replay in .*nan_step_00000018: the same command with --replay"):
        run(stage, tmp_path)
    folder = tmp_path / "nan_step_00000018"
    record = json.loads((folder / "record.json").read_text())
    assert (record["step"], record["checkpoint"], record["stage"], record["seed"]) == (18, first_stretch, "toy", 0)
    np.testing.assert_array_equal(kept_batch(folder, {"x": 0})["x"], ToyBatches(nan_at=17)[17]["x"])

    found = replay(stage, tmp_path)
    assert found.step == 18
    assert list(found.metrics) == ["loss", "gradient_norm/blocks", "gradient_norm/head"]
    assert "params.head.kernel" in found.leaves and "step" not in found.leaves
    assert found.where.startswith("invalid value (nan) encountered in") and "toy_stage.py" in found.where
    assert "step 18 is the first that is not finite\n  metrics: loss nan" in str(found)
    assert replay(toy_stage(batches=ToyBatches), tmp_path).step == 18, "by the batch that was kept, not the one that is there now"


def test_parameters_that_went_first_are_named(tmp_path, monkeypatch):
    """Only the save finds it: no metric shows it yet."""
    monkeypatch.setattr("pikastream_jax.training.replay._first_nan", lambda *arguments: None)  # a whole optimiser, one operation after another
    stage = toy_stage(nan_params_at=20)
    with pytest.raises(NonFiniteError):
        run(stage, tmp_path, steps=20, log_every=30)
    found = replay(stage, tmp_path)
    assert (found.step, found.metrics) == (20, {})
    assert "params.head.kernel" in found.leaves and not any(name.startswith("opt_state") for name in found.leaves)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no nan_step_"):
        replay(toy_stage(), tmp_path)
    with pytest.raises(NonFiniteError):
        run(toy_stage(nan_loss_at=3), tmp_path)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        replay(toy_stage(seed=1), tmp_path)
    with pytest.raises(ValueError, match="all updates up to 3 are finite this time, then loss is nan"):
        replay(toy_stage(), tmp_path)


def test_the_last_failure_is_the_latest(tmp_path):
    """A run begun anew with another rate may fail at a smaller number than the one before it."""
    for when, (step, rate) in enumerate(((500, 3e-3), (300, 1e-3)), start=1):
        os.utime(keep_failure(tmp_path, step, {"rate": rate}, {}), (when, when))
    assert (last_failure(tmp_path)["step"], last_failure(tmp_path)["rate"]) == (300, 1e-3)


def test_a_batch_keeps_every_bit(tmp_path):
    batch = {"b": {"x": np.float32([[0.1, np.nan]]), "n": np.arange(3)}, "a": np.array(True)}
    folder = keep_failure(tmp_path, 5, {"what": "loss is nan"}, batch)
    for got, want in zip(*(list(map(np.asarray, jax.tree.leaves(tree))) for tree in (kept_batch(folder, batch), batch)), strict=True):
        assert (got.dtype, got.tobytes()) == (want.dtype, want.tobytes())
    assert kept_batch(keep_failure(tmp_path, 6, {}, {}), {}) == {}
