import dataclasses
import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from jax.experimental import io_callback
from PIL import Image
from toy_stage import ToyBatches, full_disk, initial_params, toy_stage

from pikastream_jax.training import loop
from pikastream_jax.training.checkpoint import Checkpoints
from pikastream_jax.training.loop import NonFiniteError, rehearse, run
from pikastream_jax.training.only_writer import only_writer


def rows(folder):
    """The metrics without the clock's figures."""
    timeless = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in ("seconds", "updates_per_second", "frames_per_second", "tera_operations_per_second"):
            row.pop(name, None)
        timeless.append(row)
    return timeless


def assert_same_run(first, second):
    (state_a, folder_a), (state_b, folder_b) = first, second
    assert jax.tree.structure(state_a) == jax.tree.structure(state_b)
    jax.tree.map(np.testing.assert_array_equal, state_a, state_b)
    assert rows(folder_a) == rows(folder_b)


def save_picture(state, data, path):
    Image.fromarray(np.full((4, 6, 3), int(state.step), np.uint8)).save(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The toy stage trained in one go."""
    folder = tmp_path_factory.mktemp("whole")
    return run(toy_stage(), folder), folder


def test_whole_run_learns_and_logs_every_row_once(whole):
    state, folder = whole
    assert int(state.step) == 60
    expected = [(step, kind) for step in range(10, 61, 10) for kind in ("train", "held_out")]
    assert [(row["step"], row["kind"]) for row in rows(folder)] == expected
    losses = [row["loss"] for row in rows(folder) if row["kind"] == "held_out"]
    assert losses[-1] < 0.7 * losses[0]
    moved = jax.tree.map(lambda new, old: float(abs(new - old).max()), state.params, initial_params())
    assert min(jax.tree.leaves(moved)) > 1e-3, "a parameter never moved, so equality below would prove little"
    noise = [row["noise"] for row in rows(folder) if row["kind"] == "train"]
    assert len(set(noise)) == len(noise), "every step has its own key"


def test_stop_and_resume_equals_one_go(whole, tmp_path):
    run(toy_stage(), tmp_path, steps=30)
    assert rows(tmp_path)[-1]["step"] == 30
    assert_same_run((run(toy_stage(), tmp_path), tmp_path), whole)


def test_stopping_between_two_rows_of_metrics_changes_nothing(whole, tmp_path):
    for steps in (3, 14, 16):
        run(toy_stage(), tmp_path, steps=steps)
    assert_same_run((run(toy_stage(), tmp_path), tmp_path), whole)


def test_resume_after_a_crash_repeats_no_row(whole, tmp_path):
    run(toy_stage(), tmp_path, steps=33)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # updates done after the checkpoint, the last row torn
        file.write('{"step": 40, "kind": "train", "loss": 9.0}\n{"step": 40, "kind": "held')
    assert_same_run((run(toy_stage(), tmp_path), tmp_path), whole)


def test_a_finished_run_is_left_alone(whole):
    state, folder = whole
    before = rows(folder)
    again = run(toy_stage(), folder)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert rows(folder) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_says_how_to_resume(whole, tmp_path, capsys, number):
    handler = signal.getsignal(number)

    def sample(state, data, path):
        save_picture(state, data, path)
        os.kill(os.getpid(), number)

    asking = toy_stage(sample=sample, sample_every=17)
    state = run(asking, tmp_path)
    assert int(state.step) == 17
    assert signal.getsignal(number) is handler
    error = capsys.readouterr().err
    assert f"stopped by {number.name} at step 17 of 60" in error and "resume with: python" in error
    assert_same_run((run(toy_stage(), tmp_path), tmp_path), whole)


def test_time_budget_stops_cleanly(tmp_path):
    state = run(toy_stage(total_steps=10_000_000), tmp_path, minutes=1.5 / 60)
    assert 0 < int(state.step) < 10_000_000
    assert Checkpoints(tmp_path / "checkpoints").latest_step == int(state.step)


def test_nan_loss_names_step_and_last_good_checkpoint(tmp_path):
    with pytest.raises(NonFiniteError, match="step 18 loss is nan; no checkpoint was written yet"):
        run(toy_stage(nan_loss_at=18), tmp_path / "fresh")
    run(toy_stage(nan_loss_at=18), tmp_path, steps=12)
    with pytest.raises(NonFiniteError, match=r"step 18 loss is nan; the last good checkpoint is .*checkpoints/12"):
        run(toy_stage(nan_loss_at=18), tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").latest_step == 12
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path))


def test_a_held_out_figure_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match="step 10 held-out loss is nan"):
        run(dataclasses.replace(toy_stage(), evaluate=lambda state, data: {"loss": float("nan")}), tmp_path)


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    run(toy_stage(nan_params_at=18), tmp_path, steps=12)
    with pytest.raises(NonFiniteError, match=r"step 18 a parameter or optimiser state.*checkpoints/12"):
        run(toy_stage(nan_params_at=18), tmp_path, steps=6)
    assert Checkpoints(tmp_path / "checkpoints").latest_step == 12


def test_rows_have_norms_of_gradients_and_speeds(tmp_path):
    run(toy_stage(total_steps=10, frames=24), tmp_path)
    train, _ = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert train["gradient_norm/blocks"] > 0 and train["gradient_norm/head"] > 0
    np.testing.assert_allclose(train["frames_per_second"], 24 * train["updates_per_second"], rtol=0.02)
    assert "tera_operations_per_second" in train and "utilisation" not in train, "a CPU's peak is not known"


def test_speeds_are_those_of_updates_alone(tmp_path, monkeypatch):
    """By a clock that updates move by 2 seconds, on the device, and evaluations by 100: also where the device is still busy when one is due."""

    class Clock:
        now = 0.0

        def pass_by(self, seconds):
            time.sleep(0.01)  # the loop runs ahead of the device
            self.now += seconds
            return np.float32(0)

    clock, own = Clock(), toy_stage(total_steps=60)

    def update(state, *more):
        new, metrics = own.update(state, *more)
        metrics["loss"] += io_callback(lambda _: clock.pass_by(2), jax.ShapeDtypeStruct((), np.float32), metrics["loss"])
        return new, metrics

    def evaluate(state, data):
        clock.pass_by(100)
        return own.evaluate(state, data)

    monkeypatch.setattr(loop.time, "monotonic", lambda: clock.now)
    run(dataclasses.replace(own, update=update, evaluate=evaluate, evaluate_every=12), tmp_path)
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    np.testing.assert_allclose([row["updates_per_second"] for row in rows if row["kind"] == "train"], 0.5)


def test_a_rehearsal_leaves_a_run_that_writes_there_alone(tmp_path):
    with only_writer(tmp_path), pytest.raises(ValueError, match="another process is writing into"):
        rehearse(toy_stage(), tmp_path)


def test_host_batches_come_in_order_and_a_resumed_run_takes_up_where_it_was(tmp_path):
    folders = tmp_path / "whole", tmp_path / "parts"
    source = ToyBatches()
    whole = run(toy_stage(batches=lambda: source), folders[0])
    assert source.asked == list(range(60)), "each once, none beyond the last"
    for steps in (13, 20, None):
        parts = run(toy_stage(batches=ToyBatches), folders[1], steps=steps)
    assert_same_run((parts, folders[1]), (whole, folders[0]))
    unlike = run(toy_stage(), tmp_path / "own")
    assert any(bool((a != b).any()) for a, b in zip(jax.tree.leaves(unlike), jax.tree.leaves(whole), strict=True))


def test_what_goes_wrong_with_a_batch_is_raised_and_what_was_done_is_kept(tmp_path):
    class Torn(ToyBatches):
        def __getitem__(self, n):
            if n == 21:
                raise ValueError("shard 3 is torn")
            return super().__getitem__(n)

    with pytest.raises(ValueError, match="shard 3 is torn"):
        run(toy_stage(batches=Torn), tmp_path, save_every_minutes=0)
    assert Checkpoints(tmp_path / "checkpoints").latest_step == 21


def test_a_full_disk_stops_the_run_with_the_earlier_checkpoint_whole(tmp_path, capsys):
    del capsys  # keeps what is printed in memory: the limit would hold for a file of it too
    run(toy_stage(), tmp_path, steps=20)
    metrics = tmp_path / "metrics.jsonl"
    before = metrics.read_text()
    with full_disk(len(before) + 10), pytest.raises(OSError, match=r"metrics.jsonl cannot be written \(File too large\): make room"):
        run(toy_stage(), tmp_path)
    assert metrics.read_text()[: len(before)] == before
    assert int(run(toy_stage(), tmp_path, steps=1).step) == 21


def test_only_the_last_two_checkpoints_stay(tmp_path):
    run(toy_stage(), tmp_path, steps=4, save_every_minutes=0)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]
    run(toy_stage(), tmp_path, steps=3, save_every_minutes=0, keep=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["5", "6", "7"]


def test_samples_are_named_by_step(tmp_path):
    stage = toy_stage(total_steps=25, sample=save_picture, sample_every=10)
    run(stage, tmp_path)
    found = {path.name: np.asarray(Image.open(path))[0, 0, 0] for path in (tmp_path / "samples").iterdir()}
    assert found == {f"step_{step:08d}.png": step for step in (10, 20, 25)}


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(toy_stage(), tmp_path, steps=2)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        run(toy_stage(seed=1), tmp_path)
    with pytest.raises(ValueError, match=r"config.widths was .*16.*, is .*32"):
        run(toy_stage(config={"widths": (8, 32)}), tmp_path)
    assert int(run(toy_stage(total_steps=61), tmp_path, steps=1).step) == 3, "a stage may be given more updates"


@pytest.mark.parametrize("argument", ["minutes", "steps", "log_every"])
def test_budgets_must_be_positive(tmp_path, argument):
    with pytest.raises(ValueError, match=f"{argument} must be above 0, got 0"):
        run(toy_stage(), tmp_path, **{argument: 0})
