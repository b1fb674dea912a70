"""RTP and MPEG-TS of live sessions, read by FFmpeg; GStreamer reads the same RTP in tests/serving."""

import asyncio
import os
import subprocess
import sys
import threading

import av
import numpy as np
import pytest
from aiohttp.test_utils import unused_port
from media import play
from service import created, served, until

from pikastream_jax.live.outlet import check_outlet
from pikastream_jax.serving.errors import ServeError

SERVER = """
import sys
from pathlib import Path
sys.path[:0] = ["tests/live", "."]
from fake_model import FakeModel
from pikastream_jax.live.listen import ListenOptions, listen
options = ListenOptions("127.0.0.1:0", None, {}, output=sys.argv[1], sdp=Path(sys.argv[2]), avatar="ada")
sys.exit(listen(options, lambda text: print(text, file=sys.stderr, flush=True), lambda: FakeModel(size=256)))
"""


def free_port():
    """Even, with the next three likely free."""
    return unused_port() // 2 * 2


def receive(sdp):
    """What FFmpeg's RTP receiver makes of the stream that a file describes."""
    options = {"protocol_whitelist": "file,udp,rtp", "analyzeduration": "1000000"}
    return play(av.open(str(sdp), format="sdp", options=options, timeout=(10, 2)))


def test_rtp_goes_to_whoever_asks_and_ends_when_told(tmp_path):
    async def run(client, app):
        made = await created(client)
        path = f"/api/sessions/{made['id']}"
        port = free_port()
        answer = await client.post(path + "/rtp", json={"port": port})
        assert answer.status == 201 and answer.headers["Location"] == f"{path}/rtp/{port}"
        (tmp_path / "live.sdp").write_text(await answer.text(), newline="")
        assert (await client.post(path + "/rtp", json={"port": port})).status == 409
        playing = asyncio.get_running_loop().run_in_executor(None, receive, tmp_path / "live.sdp")
        async with client.ws_connect(path + "/audio") as socket:
            await asyncio.sleep(2.0)
            await socket.send_bytes((28000 * np.sin(np.arange(16_000) * 0.3)).astype("<i2").tobytes())
            await socket.send_str("end")
            await until(client, path, lambda report: report["utterances"] and report["utterances"][-1]["last"])
            await asyncio.sleep(0.5)
        assert (await client.get(path)).status == 200
        assert (await client.delete(f"{path}/rtp/{port}")).status == 204
        assert (await client.delete(f"{path}/rtp/{port}")).status == 404
        return await asyncio.wait_for(playing, 20)

    played = served(run)
    assert played.codecs == {"h264", "opus"}
    assert len(played.frames) >= 40  # it joins with a key frame, of which there is one a second
    assert np.median(np.diff(played.times)) == pytest.approx(0.04, abs=2e-3)
    # The made-up face shows how loud the sound is: the first blue picture and the first loud sample belong together.
    blue = [time for time, frame in zip(played.times, played.frames, strict=True) if frame[128, 128, 2] > 30]
    assert blue and abs(min(played.clicks) - blue[0]) < 0.06


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({}, 422, "port None is no whole number"),
        ({"port": "x"}, 422, "port 'x' is no whole number"),
        ({"port": 0}, 422, "port 0 leaves no room for the sound"),
        ({"port": 65535}, 422, "port 65535 leaves no room"),
        ({"host": "example.org", "port": 5004}, 422, "unknown field host: there are port"),
    ],
)
def test_rtp_that_is_refused(fields, status, reason):
    async def run(client, app):
        made = await created(client)
        answer = await client.post(f"/api/sessions/{made['id']}/rtp", json=fields)
        assert answer.status == status and reason in (await answer.json())["error"]

    served(run)


def test_a_session_of_the_command_line_is_a_transport_stream_on_stdout(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SERVER, "-", "unused.sdp"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with av.open(process.stdout, format="mpegts", options={"probesize": "100000"}) as file:
        times = []
        for frame in file.decode(video=0):
            times.append(float(frame.pts * frame.time_base))
            if len(times) == 30:
                break
    assert np.median(np.diff(times)) == pytest.approx(0.04, abs=1e-3)
    process.stdout.close()  # the reader goes away: so does the server
    assert process.wait(20) == 0
    said = process.stderr.read().decode()
    assert "goes to standard output" in said and "Traceback" not in said


def test_a_reader_that_pauses_stops_nobody(tmp_path):
    """A full pipe: the server still serves, and still ends when it is told to."""
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", SERVER, "-", "unused.sdp"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    for line in process.stderr:
        if "goes to" in line:
            break
    threading.Event().wait(3.0)
    process.terminate()
    assert process.wait(20) == 0
    os.close(read)


def test_a_session_of_the_command_line_over_rtp(tmp_path):
    sdp = tmp_path / "live.sdp"
    process = subprocess.Popen([sys.executable, "-c", SERVER, f"rtp://127.0.0.1:{free_port()}", str(sdp)], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "watch with" in line:
            break
    with av.open(str(sdp), format="sdp", options={"protocol_whitelist": "file,udp,rtp"}, timeout=(10, 5)) as file:
        frames = []
        for frame in file.decode(video=0):
            frames.append(frame)
            if len(frames) == 10:
                break
    assert frames[0].width == 256
    process.terminate()
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("talk.mp4", "a live session goes to - .MPEG-TS. or rtp://HOST:PORT; --record DIR keeps it"),
        ("rtp://127.0.0.1", "is not rtp://HOST:PORT"),
        ("rtp://127.0.0.1:5004", "there is no directory"),
    ],
)
def test_outlets_that_are_refused(tmp_path, output, reason):
    with pytest.raises(ServeError, match=reason):
        check_outlet(output, tmp_path / "none" / "a.sdp")
