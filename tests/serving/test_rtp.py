import base64
import shutil
import signal
import socket
import subprocess
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from fakes import FakeGenerator
from media import play, write_clicks, write_face

from pikastream_jax.serving.command import main
from pikastream_jax.serving.encode import MediaFormat
from pikastream_jax.serving.errors import ServeError
from pikastream_jax.serving.rtp import Destination, RtpOutput, parse_destination


def free_port() -> int:
    """An even port whose next three are free as well, for RTP and RTCP of both media."""
    for port in range(20_000, 60_000, 10):
        sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(4)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("127.0.0.1", port + offset))
            return port
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no free ports")


def test_a_player_opens_the_sdp_and_sees_both_in_sync(tmp_path):
    port, received = free_port(), []
    write_clicks(tmp_path / "speech.wav", 5.0)
    write_face(tmp_path / "face.png")
    sdp = tmp_path / "stream.sdp"

    def receive():
        while not sdp.exists():
            time.sleep(0.01)
        options = {"protocol_whitelist": "file,udp,rtp", "analyzeduration": "1000000"}
        received.append(play(av.open(str(sdp), format="sdp", options=options, timeout=(10, 2))))

    receiver = threading.Thread(target=receive, daemon=True)
    receiver.start()
    started = time.perf_counter()
    argv = ["--audio", str(tmp_path / "speech.wav"), "--image", str(tmp_path / "face.png"), "--sdp", str(sdp)]
    status = main([*argv, "--output", f"rtp://127.0.0.1:{port}"], lambda weights=None: FakeGenerator())
    assert status == 0
    assert time.perf_counter() - started > 4.5  # at the speed it is played
    receiver.join(15)
    (played,) = received
    assert played.codecs == {"h264", "opus"}
    # A receiver joins with a key frame, a second apart; from there it misses nothing.
    assert len(played.frames) >= 125 - 2 * 25
    np.testing.assert_allclose(np.diff(played.times), 0.04, atol=2e-3)
    assert len(played.flashes) >= 2
    nearest = [min(played.clicks, key=lambda click: abs(click - flash)) for flash in played.flashes]
    np.testing.assert_allclose(nearest, played.flashes, atol=0.02)


@pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="GStreamer is not installed")
def test_gstreamer_opens_the_sdp_and_decodes_both(tmp_path):
    """sdpdemux takes what the file says; nothing is told it on the command line but the file."""
    # The first start on a machine looks through all plugins, for seconds: not while the stream is on.
    subprocess.run(["gst-inspect-1.0", "sdpdemux"], check=True, capture_output=True)
    write_clicks(tmp_path / "speech.wav", 10.0)
    write_face(tmp_path / "face.png")
    sdp, frames, sound = (tmp_path / name for name in ("stream.sdp", "frames.raw", "sound.raw"))
    pipeline = (
        f"filesrc location={sdp} ! sdpdemux name=d latency=100 "
        f"d. ! queue ! application/x-rtp,media=video ! rtph264depay ! avdec_h264 ! videoconvert ! video/x-raw,format=RGB ! filesink location={frames} "
        f"d. ! queue ! application/x-rtp,media=audio ! rtpopusdepay ! opusdec ! audioconvert ! audio/x-raw,format=S16LE ! filesink location={sound}"
    )
    players = []

    def receive():
        while not sdp.exists():
            time.sleep(0.01)
        players.append(subprocess.Popen(["gst-launch-1.0", "-q", "-e", *pipeline.split()]))

    receiver = threading.Thread(target=receive, daemon=True)
    receiver.start()
    argv = ["--audio", str(tmp_path / "speech.wav"), "--image", str(tmp_path / "face.png"), "--sdp", str(sdp)]
    try:
        assert main([*argv, "--output", f"rtp://127.0.0.1:{free_port()}"], lambda weights=None: FakeGenerator()) == 0
        receiver.join(10)
        (player,) = players
        time.sleep(0.5)  # its jitter buffer holds a tenth of a second
        player.send_signal(signal.SIGINT)  # with -e: it ends the stream, writes what it has and leaves
        player.wait(10)
    finally:
        for player in players:
            player.kill()
    pictures = np.fromfile(frames, np.uint8).reshape(-1, 256, 256, 3)
    assert len(pictures) >= 50  # it joins with a key frame
    assert sum(picture[100:150, 100:150].mean() > 128 for picture in pictures) >= 2, "the flashes are seen"
    samples = np.fromfile(sound, np.int16)
    assert len(samples) > 2 * 48_000 and np.abs(samples).max() > 8_000, "the clicks are heard"


def test_the_sdp_describes_what_is_sent(tmp_path):
    output = RtpOutput(Destination("127.0.0.1", free_port()), tmp_path / "a.sdp", MediaFormat(256, 256, Fraction(25), 2))
    lines = (tmp_path / "a.sdp").read_bytes().decode().split("\r\n")
    assert lines[0] == "v=0" and lines[-1] == "" and "c=IN IP4 127.0.0.1" in lines
    assert "a=rtpmap:96 H264/90000" in lines and "a=rtpmap:97 opus/48000/2" in lines
    (fmtp,) = [line for line in lines if line.startswith("a=fmtp:96")]
    values = dict(pair.split("=", 1) for pair in fmtp.split(" ", 1)[1].split(";"))
    sets = [base64.b64decode(text) for text in values["sprop-parameter-sets"].split(",")]
    assert [unit[0] & 0x1F for unit in sets] == [7, 8]  # SPS, PPS
    assert values["packetization-mode"] == "1" and bytes.fromhex(values["profile-level-id"]) == sets[0][1:4]
    output.discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url, message",
    [
        ("rtp://", "not rtp://HOST:PORT"),
        ("rtp://127.0.0.1", "not rtp://HOST:PORT"),
        ("rtp:127.0.0.1:5004", "not rtp://HOST:PORT"),
        ("rtp://127.0.0.1:5004/path", "not rtp://HOST:PORT"),
        ("rtp://127.0.0.1:port", "not rtp://HOST:PORT"),
        ("rtp://127.0.0.1:99999", "not rtp://HOST:PORT"),
        ("rtp://127.0.0.1:65535", "no room"),
        ("rtp://no.such.host.invalid:5004", "has no address"),
    ],
)
def test_bad_destinations_are_refused(url, message):
    with pytest.raises(ServeError, match=message):
        parse_destination(url)


def test_ipv6_destinations():
    destination = parse_destination("rtp://[::1]:5004")
    assert destination == Destination("::1", 5004)
    assert destination.url(2).startswith("rtp://[::1]:5006?")
