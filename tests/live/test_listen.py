"""The command: its options, and a server that comes up, serves and stops."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pikastream_jax.live.listen as listen_module
from pikastream_jax.live.listen import ListenOptions, listen, parse_address
from pikastream_jax.serving.command import parse
from pikastream_jax.serving.errors import ServeError
from pikastream_jax.streaming import generator

SERVER = """
import sys
sys.path[:0] = ["tests/live", "."]
from fake_model import FakeModel
from pikastream_jax.live.listen import ListenOptions, listen
sys.exit(listen(ListenOptions("127.0.0.1:0", None, {}), lambda text: print(text, flush=True), lambda: FakeModel(size=256)))
"""


def test_the_address_may_be_left_out():
    assert parse(["--listen"]).listen == "127.0.0.1:8080"
    assert parse(["--listen", "--rows", "2"]).rows == 2
    assert parse(["--listen", "0.0.0.0:9000", "--no-label"]).listen == "0.0.0.0:9000"
    assert parse_address("[::1]:80") == ("::1", 80) and parse_address(":81") == ("127.0.0.1", 81)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give --audio FILE for one stream, or --listen for live sessions"),
        (["--audio", "x.wav", "--listen"], "not both"),
        (["--listen", "--sessions", "0"], "--sessions 0 and --rows 1 must be at least 1"),
    ],
)
def test_options_that_make_no_sense(arguments, reason):
    with pytest.raises(ServeError, match=reason):
        parse(arguments)


def test_an_address_that_others_reach_needs_a_token(monkeypatch):
    monkeypatch.delenv("PIKASTREAM_TOKEN", raising=False)
    with pytest.raises(ServeError, match="0.0.0.0 can be reached from other machines: set a token in PIKASTREAM_TOKEN"):
        listen(ListenOptions("0.0.0.0:0", None, {}), print)
    with pytest.raises(ServeError, match="'http' is no port"):
        listen(ListenOptions("localhost:http", None, {}), print)


def test_the_model_streams_in_small_chunks_and_else_as_its_file_says(monkeypatch):
    """What is asked for comes before both."""
    asked = []
    monkeypatch.setattr(generator, "load_generator", lambda weights, **stream: asked.append((weights, stream)))
    monkeypatch.setattr(listen_module, "StreamModel", lambda _, rows: rows)
    assert listen_module.load_model(None, {}, 2) == 2
    listen_module.load_model(Path("other"), {"chunk": 1, "steps": 4}, 1)
    assert asked == [(None, {"chunk": 2}), (Path("other"), {"chunk": 1, "steps": 4})]


def test_it_comes_up_and_stops_when_told():
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    said = [process.stdout.readline() for _ in range(2)]
    assert "sessions at a time" in said[0] and said[1].startswith("listening at http://127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
