import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_stage

import train
from configs import PRESETS, stage_settings
from pikastream_jax.training import clips, ode_pairs
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.settings import changed
from pikastream_jax.weights.safetensors_io import flatten

ROOT = Path(train.__file__).resolve().parent


@pytest.fixture(autouse=True)
def toy_stages(monkeypatch):
    """The toy stage in train.py's own registry."""
    monkeypatch.setitem(train.STAGES, "toy", train.Entry("toy_stage"))


def command_line(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return train.main()


def test_a_stage_trains_in_two_stretches(monkeypatch, tmp_path, capsys):
    assert command_line(monkeypatch, "toy", "--out", tmp_path, "--steps", "20") == 0
    assert (
        f"resume with: {Path(sys.executable).name} train.py toy --out {tmp_path} --steps 20"
        in capsys.readouterr().err
    )
    assert command_line(monkeypatch, "toy", "--out", tmp_path) == 0
    assert "complete after 60 updates" in capsys.readouterr().err
    assert command_line(monkeypatch, "toy", "--out", tmp_path, "--updates", "70") == 0
    assert "complete after 70 updates" in capsys.readouterr().err, "a finished run goes on when it is made longer"


def test_a_run_that_broke_is_replayed_by_the_same_command(monkeypatch, tmp_path, capsys):
    broken = ["toy", "--out", tmp_path, "--nan-loss-at", "7"]
    assert command_line(monkeypatch, *broken) == 1
    assert "with --replay tells" in capsys.readouterr().err
    before = sorted(tmp_path.rglob("*"))
    assert command_line(monkeypatch, *broken, "--replay") == 0
    assert "step 7 is the first that is not finite\n  metrics: loss nan" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert command_line(monkeypatch, "toy", "--out", tmp_path / "other", "--replay") == 1
    assert "has no nan_step_* folder" in capsys.readouterr().err


def test_a_rehearsal_leaves_nothing_to_go_on_from(monkeypatch, tmp_path):
    assert command_line(monkeypatch, "toy", "--out", tmp_path, "--rehearse") == 0
    assert not list((tmp_path / "checkpoints").iterdir())
    assert command_line(monkeypatch, "toy", "--out", tmp_path, "--steps", "1") == 0


def test_a_rehearsal_stays_out_of_runs(monkeypatch, tmp_path, capsys):
    assert command_line(monkeypatch, "toy", "--runs", tmp_path, "--steps", "1") == 0
    before = (tmp_path / "toy" / "metrics.jsonl").read_text()
    assert command_line(monkeypatch, "toy", "--runs", tmp_path, "--rehearse") == 0
    assert (tmp_path / "rehearsal" / "toy").is_dir()
    assert command_line(monkeypatch, "toy", "--out", tmp_path / "toy", "--rehearse") == 1
    assert "holds a run, which a rehearsal would write into" in capsys.readouterr().err
    assert (tmp_path / "toy" / "metrics.jsonl").read_text() == before


def test_settings_are_flags_and_stand_in_the_record(monkeypatch, tmp_path):
    for folder, asked, rate in (("given", ["--learning-rate", "2e-4"], 2e-4), ("own", [], 3e-2)):
        assert command_line(monkeypatch, "toy", "--out", tmp_path / folder, "--steps", "1", *asked) == 0
        record = json.loads((tmp_path / folder / "config.json").read_text())
        assert record["config"]["stage"]["optimiser"]["learning_rate"] == rate


def test_runs_have_their_place_and_hand_over_from_there(monkeypatch, tmp_path):
    monkeypatch.setitem(train.STAGES, "second", train.Entry("toy_stage", needs={"weights": ("missing", "toy")}))
    assert command_line(monkeypatch, "toy", "--runs", tmp_path, "--steps", "1") == 0
    assert command_line(monkeypatch, "second", "--runs", tmp_path, "--steps", "1") == 0
    assert (tmp_path / "second" / "checkpoints").is_dir()
    entry = train.STAGES["second"]
    assert entry.hand_over("second", {}, tmp_path) == {"weights": tmp_path / "toy"}
    assert entry.hand_over("second", {"weights": tmp_path}, tmp_path) == {"weights": tmp_path}, "what is given goes first"


def test_what_a_stage_makes_nothing_of_is_not_taken_from_the_folder(monkeypatch, tmp_path):
    """Trajectories that are solved while a run on clips pauses are not what it was started from."""
    monkeypatch.setitem(train.STAGES, "second", train.Entry("toy_stage", takes={"pairs": ("toy",)}))
    monkeypatch.setattr(toy_stage.Settings, "passed_over", lambda settings, given: () if given else ("pairs",))
    assert command_line(monkeypatch, "second", "--runs", tmp_path, "--steps", "1") == 0
    assert command_line(monkeypatch, "toy", "--runs", tmp_path, "--steps", "1") == 0
    assert command_line(monkeypatch, "second", "--runs", tmp_path, "--steps", "1") == 0
    assert json.loads((tmp_path / "second" / "config.json").read_text())["config"]["init"] == {}
    assert command_line(monkeypatch, "second", "--runs", tmp_path, "--out", tmp_path / "told", "--steps", "1", "--init", f"pairs={tmp_path / 'toy'}") == 0
    assert json.loads((tmp_path / "told" / "config.json").read_text())["config"]["init"]["pairs"].startswith("toy, 1 updates")


def test_which_stages_make_nothing_of_what(tmp_path):
    causal, pretrain = (train.STAGES[name].load().Settings for name in ("dit_causal", "dit_pretrain"))
    assert causal().passed_over({}) == ()
    assert causal(objective="data").passed_over({}) == causal(objective="diffusion_forcing").passed_over({}) == ("pairs",)
    assert pretrain().passed_over({"clips": tmp_path}) == ()
    for run in ("clips", "vae_streaming", "latent_reader", "audio_pretrain", "text_pretrain"):
        (tmp_path / run).mkdir()
    given = {"denoiser": tmp_path / "older"}
    found = train.STAGES["dit_pretrain"].hand_over("dit_pretrain", given, tmp_path, pretrain().passed_over(given))
    assert set(found) == {"denoiser", "clips", "flash_vae", "reader"}, "a denoiser keeps the encoders that it was trained with"


def test_a_run_is_not_continued_from_something_else(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(train.STAGES, "second", train.Entry("toy_stage", needs={"weights": ("missing", "toy")}))
    assert command_line(monkeypatch, "toy", "--runs", tmp_path, "--steps", "1") == 0
    assert command_line(monkeypatch, "second", "--runs", tmp_path, "--steps", "1") == 0
    assert command_line(monkeypatch, "second", "--runs", tmp_path, "--steps", "1") == 0
    assert command_line(monkeypatch, "toy", "--runs", tmp_path, "--steps", "1") == 0
    capsys.readouterr()
    assert command_line(monkeypatch, "second", "--runs", tmp_path) == 1
    told = capsys.readouterr().err
    assert "holds another run (config.init.weights was 'toy, 1 updates (" in told and "is 'toy, 2 updates (" in told and told.count("\n") == 1


def test_the_settings_of_a_preset_are_the_stage_s_own_where_it_says_nothing():
    for name, stages in ((name, stage_settings(name)) for name in PRESETS):
        for stage, changes in stages.items():
            start = train.STAGES[stage].load().Settings() if stage in train.STAGES else {"clips": clips, "ode_pairs": ode_pairs}[stage].Arguments()
            settings = changed(start, changes)
            assert all(getattr(settings, field) == value for field, value in changes.items() if not isinstance(value, dict)), (name, stage)
    with pytest.raises(ValueError, match="has no setting lenght; it has batch"):
        changed(train.STAGES["vae_low_res"].load().Settings(), {"lenght": 3})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["dit_pretran"], "unknown stage 'dit_pretran': choose one of vae_low_res"),
        (["toy", "--config", "huge"], "huge"),
        (["toy", "--init", "weights"], "--init 'weights' must be NAME=PATH"),
        (["toy", "--init", "flash_vae=/nowhere"], "--init flash_vae: there is no /nowhere"),
        (["toy", "--nan-loss-at", "7"], "at step 7 loss is nan"),
        (["toy", "--steps", "0"], "steps must be above 0, got 0"),
        (["toy", "--cpu-devices", "0"], "--cpu-devices 0 must be at least 1"),
        (["dit_causal", "--init", "clips=.", "--runs", "nowhere"], "dit_causal needs flash_vae, and nowhere has no vae_adversarial or vae_streaming: train that first, or give --init flash_vae=PATH"),
        (["dit_causal", "--runs", "nowhere"], "dit_causal needs clips, and nowhere has no clips"),
        (["audio_pretrain", "--init", "denoiser=."], "audio_pretrain takes no --init denoiser; it takes audio"),
        (["dit_pretrain", "--init", "clips=.", "flash_vae=.", "reader=.", "denoizer=."], "dit_pretrain takes no --init denoizer"),
        (["toy", "--updates", "0"], "updates 0 must be at least 1"),
        (["toy", "--learning-rate", "-1"], "learning_rate must be above 0, got -1"),
        (["vae_low_res", "--crop", "300"], "crop 300 is larger than the 256x256 pictures of tiny"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_1(monkeypatch, tmp_path, capsys, arguments, message):
    assert command_line(monkeypatch, *arguments, "--out", tmp_path / "run") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train.py: ") and message in last


def test_the_help_lists_every_stage(monkeypatch, capsys):
    assert command_line(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in train.STAGES)


@pytest.mark.parametrize("stage", sorted(train.STAGES))
def test_every_stage_tells_its_flags(monkeypatch, capsys, stage):
    """A stage's settings and the flags of every run may not have the same names."""
    with pytest.raises(SystemExit) as left:
        command_line(monkeypatch, stage, "--help")
    told = capsys.readouterr().out
    assert left.value.code == 0 and "--updates" in told and "--steps" in told and "--learning-rate" in told


def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
    """Two devices and then one, against one all the way: the same state, whatever the stacks of matrices are filled up to."""
    path = str(Path(__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {path!r}); import train, jax; train.STAGES['toy'] = train.Entry('toy_stage'); "
        "status = train.main(); print(len(jax.devices())); sys.exit(status)"
    )

    def run(folder, *arguments):
        done = subprocess.run(
            [sys.executable, "-c", code, "toy", "--out", str(tmp_path / folder), *arguments],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run("two", "--cpu-devices", "2", "--steps", "5") == "2"
    assert run("two", "--steps", "5") == "1"
    assert run("one", "--steps", "10") == "1"
    states = [flatten(load_weights(tmp_path / folder)) for folder in ("two", "one")]
    for name, leaf in states[1].items():
        np.testing.assert_allclose(states[0][name], leaf, rtol=1e-4, atol=1e-6, err_msg=name)


def test_sigterm_saves_and_exits_0(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import train; "
        "train.STAGES['endless'] = train.Entry('toy_stage'); sys.exit(train.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "endless", "--updates", "10000000", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        metrics = tmp_path / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert "stopped by SIGTERM" in error and "resume with:" in error and "Traceback" not in error
    assert any((tmp_path / "checkpoints").iterdir())
