"""serve.py as a process: pipes, signals, imports."""

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from media import clicks, play, write_clicks, write_face

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def start(*arguments, step_seconds=0.0, **kwargs):
    """serve.py with the fake generator; kwargs as of Popen."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores Ctrl-C, and hands that on
        signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(HERE / "fakes.py"), str(step_seconds), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, **(pipes | kwargs))
    _started.append(process)
    return process


_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@pytest.fixture
def face(tmp_path):
    return write_face(tmp_path / "face.png")


def pcm(seconds, **kwargs) -> bytes:
    return (clicks(seconds, 16_000, **kwargs) * 32767).astype("<i2").tobytes()


def test_raw_sound_in_and_a_transport_stream_out(face):
    process = start("--audio", "-", "--image", face, stdin=subprocess.PIPE)
    out, err = process.communicate(pcm(2.0), timeout=30)
    assert process.returncode == 0, err
    played = play(out)
    assert len(played.frames) == 50 and played.codecs == {"h264", "aac"}
    np.testing.assert_allclose(played.clicks, played.flashes, atol=0.02)


def test_frames_leave_while_the_sound_still_comes(face):
    process = start("--audio", "-", "--image", face, stdin=subprocess.PIPE)
    sound = pcm(0.96)
    process.stdin.write(sound[:16_000])  # half a second: one chunk and a bit
    process.stdin.flush()
    received = b""
    while len(received) < 4096:
        received += os.read(process.stdout.fileno(), 65_536)
    time.sleep(0.2)
    received += os.read(process.stdout.fileno(), 65_536) if _readable(process.stdout) else b""
    assert process.poll() is None and len(play(received).frames) >= 11
    out, _ = process.communicate(sound[16_000:], timeout=30)
    assert process.returncode == 0 and len(play(received + out).frames) == 24


def _readable(pipe):
    return bool(select.select([pipe], [], [], 0)[0])


def test_a_reader_that_goes_away_ends_the_stream_quietly(tmp_path, face):
    write_clicks(tmp_path / "speech.wav", 20.0)
    process = start("--audio", tmp_path / "speech.wav", "--image", face)
    head = process.stdout.read(20_000)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(20) == 0, err
    assert "Traceback" not in err and "BrokenPipe" not in err and "reader closed" in err
    assert len(play(head).frames) > 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("container", ["mp4", "ts"])
def test_a_signal_in_mid_stream_leaves_a_playable_file(tmp_path, face, number, container):
    path = tmp_path / f"out.{container}"
    process = start("--audio", "-", "--image", face, "--output", path, stdin=subprocess.PIPE)
    process.stdin.write(pcm(2.0))  # and no more, but no end either
    process.stdin.flush()
    _wait_for(process.stderr, "first frame")
    time.sleep(0.5)
    process.send_signal(number)
    err = process.stderr.read().decode()
    assert process.wait(20) == 0, err
    assert "Traceback" not in err and "interrupted" in err
    played = play(path)
    assert len(played.frames) == 48 and abs(played.sound_end - 1.92) < 0.04
    np.testing.assert_allclose(played.clicks, played.flashes, atol=0.02)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["face.png", path.name]


def test_a_signal_before_the_first_frame_leaves_nothing(tmp_path, face):
    process = start("--audio", "-", "--image", face, "--output", tmp_path / "out.mp4", stdin=subprocess.PIPE)
    process.stdin.write(pcm(0.1))
    process.stdin.flush()
    _wait_for(process.stderr, "frame")  # the progress line
    process.send_signal(signal.SIGINT)
    err = process.stderr.read().decode()
    assert process.wait(20) == 130
    assert "Traceback" not in err and "nothing was written" in err
    assert [each.name for each in tmp_path.iterdir()] == ["face.png"]


def test_a_full_disk_is_one_line(tmp_path, face):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    write_clicks(tmp_path / "speech.wav", 2.0)
    with open("/dev/full", "wb") as full:
        process = start("--audio", tmp_path / "speech.wav", "--image", face, stdout=full)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    lines = err.decode().replace("\r", "\n").splitlines()
    assert (
        "error: cannot write to standard output: No space left on device" in lines and "Traceback" not in err.decode()
    )


def test_terminals_are_refused(face):
    """A terminal on either side gets a sentence, not a screen full of video or a silent wait."""
    leader, follower = os.openpty()
    try:
        process = start("--audio", face, "--image", face, stdout=follower)
        assert process.wait(20) == 1 and b"standard output is a terminal" in process.stderr.read()
        process = start("--audio", "-", "--image", face, stdin=follower)
        assert process.wait(20) == 1 and b"standard input is a terminal" in process.stderr.read()
    finally:
        os.close(leader)
        os.close(follower)


def wav(seconds) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clicks(seconds, 16_000), 16_000, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "standard input ended before any audio came"),
        (b"\0", "standard input ended before there was sound for a frame; nothing was written"),
        (wav(0.0), "standard input ended before there was sound for a frame; nothing was written"),
    ],
)
def test_a_pipe_without_sound_is_one_line(tmp_path, face, data, message):
    process = start("--audio", "-", "--image", face, "--output", tmp_path / "out.mp4", stdin=subprocess.PIPE)
    out, err = process.communicate(data, timeout=30)
    assert process.returncode == 1 and out == b""
    assert err.decode().strip().splitlines()[-1] == f"error: {message}"
    assert not (tmp_path / "out.mp4").exists()


def test_serving_imports_neither_the_renderer_nor_training():
    script = (
        "import sys, importlib, pkgutil, pikastream_jax.serving.command\n"
        "assert 'jax' not in sys.modules, 'importing the command must be quick'\n"
        "for name in ('pikastream_jax.serving', 'pikastream_jax.streaming'):\n"
        "    for m in pkgutil.iter_modules(importlib.import_module(name).__path__, name + '.'):\n"
        "        importlib.import_module(m.name)\n"
        "bad = [m for m in sys.modules if m.startswith(('pikastream_jax.data', 'pikastream_jax.training'))]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=60)


def _wait_for(pipe, text):
    seen = ""
    while text not in seen:
        piece = os.read(pipe.fileno(), 4096).decode()
        assert piece, seen
        seen += piece
