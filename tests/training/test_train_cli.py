import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.weights.safetensors_io import flatten

ROOT = Path(train.__file__).resolve().parent


@pytest.fixture(autouse=True)
def toy_stages(monkeypatch):
    """The toy stages under train.py's own registry."""
    for name in ("build", "build_endless", "build_nan", "build_rated"):
        monkeypatch.setitem(train.STAGES, name, train.Entry(f"toy_stage:{name}"))


def command_line(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return train.main()


def test_a_stage_trains_in_two_stretches(monkeypatch, tmp_path, capsys):
    assert command_line(monkeypatch, "build", "--out", tmp_path, "--steps", "20") == 0
    assert (
        f"resume with: {Path(sys.executable).name} train.py build --out {tmp_path} --steps 20"
        in capsys.readouterr().err
    )
    assert command_line(monkeypatch, "build", "--out", tmp_path) == 0
    assert "complete after 60 updates" in capsys.readouterr().err
    assert command_line(monkeypatch, "build", "--out", tmp_path, "--updates", "70") == 0
    assert "complete after 70 updates" in capsys.readouterr().err, "a finished run goes on when it is made longer"


def test_the_learning_rate_reaches_a_stage_that_takes_one(monkeypatch, tmp_path):
    for folder, asked, rate in (("given", ["--learning-rate", "2e-4"], 2e-4), ("own", [], None)):
        assert command_line(monkeypatch, "build_rated", "--out", tmp_path / folder, "--steps", "1", *asked) == 0
        assert json.loads((tmp_path / folder / "config.json").read_text())["config"]["rate"] == rate


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["dit_pretran"], "unknown stage 'dit_pretran': choose one of flash_vae_low_res"),
        (["build", "--config", "huge"], "huge"),
        (["build", "--init", "weights"], "--init 'weights' must be NAME=PATH"),
        (["build", "--init", "flash_vae=/nowhere"], "--init flash_vae: there is no /nowhere"),
        (["build_nan"], "at step 7 loss is nan"),
        (["build", "--steps", "0"], "steps must be above 0, got 0"),
        (["build", "--cpu-devices", "0"], "--cpu-devices 0 must be at least 1"),
        (["dit_causal", "--init", "clips=."], "dit_causal needs --init flash_vae=PATH; it takes clips, flash_vae, reader, denoiser"),
        (["flash_vae_decoder", "--init", "flash_vae=."], "flash_vae_decoder needs --init face_reader=PATH"),
        (["audio_pretrain", "--init", "denoiser=."], "audio_pretrain takes no --init denoiser; it takes none"),
        (["dit_pretrain", "--init", "clips=.", "flash_vae=.", "reader=.", "denoizer=."], "dit_pretrain takes no --init denoizer"),
        (["build", "--updates", "0"], "--updates 0 must be at least 1"),
        (["build", "--learning-rate", "1e-3"], "build takes no --learning-rate"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_1(monkeypatch, tmp_path, capsys, arguments, message):
    assert command_line(monkeypatch, *arguments, "--out", tmp_path / "run") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train.py: ") and message in last


def test_every_registered_stage_is_in_the_help():
    shipped = [name for name, entry in train.STAGES.items() if entry.build.startswith("pikastream_jax.")]
    source = Path(train.__file__).read_text()
    assert f"One of {', '.join(shipped)}." in source


def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
    """Two devices and then one, against one all the way: the same state, whatever the stacks of matrices are filled up to."""
    path = str(Path(__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {path!r}); import train, jax; train.STAGES['build'] = train.Entry('toy_stage:build'); "
        "status = train.main(); print(len(jax.devices())); sys.exit(status)"
    )

    def run(folder, *arguments):
        done = subprocess.run(
            [sys.executable, "-c", code, "build", "--out", str(tmp_path / folder), *arguments],
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
        "train.STAGES['endless'] = train.Entry('toy_stage:build_endless'); sys.exit(train.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "endless", "--out", str(tmp_path)],
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
