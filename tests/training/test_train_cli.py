import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).resolve().parent


@pytest.fixture(autouse=True)
def toy_stages(monkeypatch):
    """The toy stages under train.py's own registry."""
    for name in ("build", "build_endless", "build_nan"):
        monkeypatch.setitem(train.STAGES, name, f"toy_stage:{name}")


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["dit_pretran"], "unknown stage 'dit_pretran': choose one of flash_vae_low_res"),
        (["build", "--config", "huge"], "huge"),
        (["build", "--init", "weights"], "--init 'weights' must be NAME=PATH"),
        (["build", "--init", "flash_vae=/nowhere"], "--init flash_vae: there is no /nowhere"),
        (["build_nan"], "at step 7 loss is nan"),
        (["build", "--steps", "0"], "steps must be above 0, got 0"),
        (["build", "--updates", "0"], "--updates 0 must be at least 1"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_1(monkeypatch, tmp_path, capsys, arguments, message):
    assert command_line(monkeypatch, *arguments, "--out", tmp_path / "run") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train.py: ") and message in last


def test_every_registered_stage_is_in_the_help():
    shipped = [name for name, target in train.STAGES.items() if target.startswith("pikastream_jax.")]
    source = Path(train.__file__).read_text()
    assert f"One of {', '.join(shipped)}." in source


def test_sigterm_saves_and_exits_0(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import train; "
        "train.STAGES['endless'] = 'toy_stage:build_endless'; sys.exit(train.main())"
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
