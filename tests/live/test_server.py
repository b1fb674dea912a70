"""The HTTP service over a model that is made up: sessions, changes, refusals, access, media."""

import asyncio
import hashlib
import io
import json

import av
import numpy as np
import pytest
from aiohttp import WSMsgType, WSServerHandshakeError
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.rtp import RtcpSrPacket
from PIL import Image
from service import created, form, png, served, until

from pikastream_jax.live.access import Access, is_loopback
from pikastream_jax.live.hub import Limits
from pikastream_jax.live.media import FrameEncoder
from pikastream_jax.live.session import Frame


def test_a_session_lives_and_ends():
    async def run(client, app):
        assert (await (await client.get("/health")).json()) == {"status": "ok", "sessions": 0, "capacity": 2}
        made = await created(client, avatar="grace", prompt="a woman smiling", seed=3)
        assert made["avatar"] == "grace" and made["prompt"] == "a woman smiling" and made["seed"] == 3
        path = f"/api/sessions/{made['id']}"
        await until(client, path, lambda report: report["figures"]["frames"] >= 5)
        changed = await (await client.patch(path, json={"prompt": "sad", "avatar": "ada"})).json()
        assert changed["avatar"] == "ada" and changed["prompt"] == "sad"
        assert changed["face_shows_at"] > 0 and changed["prompt_shows_at"] >= changed["face_shows_at"]
        metrics = await (await client.get("/metrics")).text()
        assert "pikastream_sessions 1\n" in metrics and f'late_frames_total{{session="{made["id"]}"}} ' in metrics
        assert (await client.delete(path)).status == 204
        assert (await client.get(path)).status == 404
        assert (await (await client.get("/ready")).json()) == {"ready": True, "free": 2}

    served(run)


def test_speech_by_websocket_is_shown_and_interrupted():
    async def run(client, app):
        made = await created(client)
        path = f"/api/sessions/{made['id']}"
        async with client.ws_connect(path + "/audio?rate=24000") as socket:
            await socket.send_bytes((np.full(24_000 * 3, 8000)).astype("<i2").tobytes())
            await socket.send_str("end")
            report = await until(client, path, lambda report: report["speaking"])
            assert report["utterances"][0]["last"] is None
            await socket.send_str("interrupt")
            assert 0 < (await socket.receive_json())["played_seconds"] < 3
            report = await until(client, path, lambda report: not report["speaking"])
            assert report["utterances"][0]["last"] is not None
            await socket.send_bytes(b"odd")
            assert (await socket.receive_json())["error"] == "3 bytes are no 16-bit samples: send an even number"
            assert (await socket.receive()).type is WSMsgType.CLOSE
        cut = await (await client.post(path + "/interrupt")).json()
        assert cut == {"played_seconds": 0.0, "dropped_seconds": 0.0}

    served(run)


REFUSALS = [
    ("/api/sessions", {"json": {"avatar": "nobody"}}, 422, "no avatar is called 'nobody'"),
    ("/api/sessions", {"json": {"prompt": "x" * 501}}, 422, "501 characters, the limit is 500"),
    ("/api/sessions", {"json": {"prompt": 5}}, 422, "the prompt is int: send text"),
    ("/api/sessions", {"json": {"seed": -1}}, 422, "seed -1 is out of range"),
    ("/api/sessions", {"json": {"seed": "x"}}, 422, "seed 'x' is no whole number"),
    ("/api/sessions", {"json": {"face": "ada"}}, 422, "unknown field face: there are avatar"),
    ("/api/sessions", {"json": [1]}, 400, "JSON list: send an object"),
    ("/api/sessions", {"data": "{", "headers": {"Content-Type": "application/json"}}, 400, "the body is no JSON"),
    ("/api/sessions", {"data": "x", "headers": {"Content-Type": "text/plain"}}, 415, "text/plain: send application/json"),
    ("/api/sessions", {"data": lambda: form(png())}, 403, "send consent=true if you have it"),
    ("/api/sessions", {"data": lambda: form(b"GIF89a no picture", consent="true")}, 422, "upload is not an image"),
    ("/api/sessions", {"data": lambda: form(png(kind="GIF"), consent="true")}, 422, "upload is not an image; give PNG, JPEG or WebP"),
    ("/api/sessions", {"data": lambda: form(png((20, 300)), consent="true")}, 422, "each side needs at least 64"),
    ("/api/sessions", {"data": lambda: form(png((9000, 9000)), consent="true")}, 422, "the limit is 40 million"),
    ("/api/sessions", {"data": lambda: form(png(), consent="true", avatar="ada")}, 422, "send one of them"),
    ("/api/sessions/none/webrtc", {"json": {"type": "offer", "sdp": ""}}, 404, "there is no session 'none'"),
    ("/api/sessions/none/interrupt", {}, 404, "it has ended, or never was"),
]


def test_refusals_say_why():
    async def run(client, app):
        for path, request, status, reason in REFUSALS:
            request = {name: value() if callable(value) else value for name, value in request.items()}
            answer = await client.post(path, **request)
            body = await answer.json()
            assert answer.status == status and reason in body["error"], (path, answer.status, body)
        made = await created(client)
        path = f"/api/sessions/{made['id']}"
        for body, reason in (({}, "nothing to change"), ({"seed": 3}, "unknown field seed")):
            answer = await client.patch(path, json=body)
            assert answer.status == 422 and reason in (await answer.json())["error"]
        for body, reason in (({"type": "offer", "sdp": "v=0 nonsense"}, "SDP offer"), ({"type": "answer"}, "send {type: offer")):
            answer = await client.post(path + "/webrtc", json=body)
            assert answer.status == 422 and reason in (await answer.json())["error"]
        assert (await client.put(path)).status == 405
        assert (await client.get("/page/../server.py")).status == 404

    served(run)


def test_the_one_too_many_is_refused_and_comes_in_when_there_is_room():
    async def run(client, app):
        made = [await created(client) for _ in range(2)]
        answer = await client.post("/api/sessions", json={})
        assert answer.status == 503 and answer.headers["Retry-After"] == "30"
        assert "2 sessions are served and 2 is the most" in (await answer.json())["error"]
        assert (await client.get("/ready")).status == 503
        await client.delete(f"/api/sessions/{made[0]['id']}")
        await created(client)

    served(run)


def test_limits_of_a_client_and_of_idleness():
    async def run(client, app):
        await created(client)
        answer = await client.post("/api/sessions", json={})
        assert answer.status == 429 and "1 sessions of one client" in (await answer.json())["error"]
        await until(client, "/health", lambda health: health["sessions"] == 0)  # nobody watched

    served(run, limits=Limits(sessions_per_client=1, idle_seconds=1.0))


def test_pages_of_others_and_names_of_others_are_refused():
    async def run(client, app):
        host = f"{client.host}:{client.port}"
        for headers, status in (
            ({"Origin": f"http://{host}"}, 201),
            ({"Origin": "https://evil.example"}, 403),
            ({"Host": "evil.example"}, 421),
            ({"Host": "localhost"}, 201),
        ):
            answer = await client.post("/api/sessions", json={}, headers=headers)
            assert answer.status == status, headers
        page = await client.get("/")
        assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]

    served(run)


def test_without_the_token_nothing_but_health():
    async def run(client, app):
        assert (await client.get("/health")).status == 200
        assert (await client.get("/api/avatars")).status == 401
        assert (await client.get("/api/avatars", headers={"Authorization": "Bearer " + "y" * 20})).status == 401
        assert (await client.get("/api/avatars", headers={"Authorization": "Bearer " + "x" * 20})).status == 200
        assert (await client.get("/api/avatars?token=" + "x" * 20)).status == 200
        with pytest.raises(WSServerHandshakeError):
            await client.ws_connect("/api/sessions/none/audio")

    served(run, access=Access("0.0.0.0", "x" * 20))
    with pytest.raises(ValueError, match="0.0.0.0 can be reached from other machines: set a token"):
        Access("0.0.0.0")
    with pytest.raises(ValueError, match="a token of 3 characters is easily guessed"):
        Access("127.0.0.1", "abc")
    assert is_loopback("[::1]") and is_loopback("localhost") and not is_loopback("example.org")


def test_the_description_names_every_route():
    async def run(client, app):
        described = await (await client.get("/openapi.json")).json()
        there = {(route.method.lower(), route.resource.canonical) for route in app.router.routes() if route.method != "HEAD"}
        said = {(method, path) for path, item in described["paths"].items() for method in item if method != "parameters"}
        assert there == said

    served(run)


async def offered(peer):
    peer.addTransceiver("video", direction="recvonly")
    peer.addTransceiver("audio", direction="recvonly")
    await peer.setLocalDescription(await peer.createOffer())
    return peer.localDescription.sdp


@pytest.mark.parametrize("way", ["webrtc", "whep"])
def test_a_real_receiver_sees_the_frames_and_hears_the_sound(way):
    async def run(client, app):
        made = await created(client)
        path = f"/api/sessions/{made['id']}"
        peer, tracks = RTCPeerConnection(), {}
        peer.on("track", lambda track: tracks.setdefault(track.kind, track))
        sdp = await offered(peer)
        if way == "webrtc":
            answer = (await (await client.post(path + "/webrtc", json={"type": "offer", "sdp": sdp})).json())["sdp"]
        else:
            response = await client.post(path + "/whep", data=sdp, headers={"Content-Type": "application/sdp"})
            assert response.status == 201
            answer, where = await response.text(), response.headers["Location"]
        assert "H264" in answer and "VP8" not in answer
        await peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))
        async with client.ws_connect(path + "/audio?rate=16000") as socket:
            frames = [await asyncio.wait_for(tracks["video"].recv(), 10) for _ in range(5)]
            await socket.send_bytes((8000 * np.sin(np.arange(32_000) * 0.3)).astype("<i2").tobytes())
            await socket.send_str("end")
            loudest = 0
            for _ in range(60):
                loudest = max(loudest, np.abs((await asyncio.wait_for(tracks["audio"].recv(), 10)).to_ndarray()).max())
        assert frames[0].width == 256 and np.allclose(np.diff([frame.pts for frame in frames]), 3600)
        assert loudest > 4000
        assert (await (await client.get(path)).json())["viewers"] == 1
        if way == "whep":
            assert (await client.delete(where)).status == 200
            assert (await client.delete(where)).status == 404
        await peer.close()

    served(run)


def test_sender_reports_put_sound_and_picture_on_one_clock_and_sound_goes_out_evenly():
    """As a browser reads them: RTP timestamp -> moment, by the stream's latest report; a picture and its sound have the same one."""

    async def run(client, app):
        made = await created(client)
        peer, sent, reports, came = RTCPeerConnection(), {}, {}, []
        sdp = await offered(peer)
        for transceiver in peer.getTransceivers():
            receiver = transceiver.receiver
            kind, handle_rtp, handle_rtcp = transceiver.kind, receiver._handle_rtp_packet, receiver._handle_rtcp_packet

            async def rtp(packet, arrival_time_ms, kind=kind, handle=handle_rtp):
                sent.setdefault(kind, packet.timestamp)
                if kind == "audio":
                    came.append(asyncio.get_running_loop().time())
                await handle(packet, arrival_time_ms)

            async def rtcp(packet, kind=kind, handle=handle_rtcp):
                if isinstance(packet, RtcpSrPacket) and kind in sent:
                    reports.setdefault(kind, []).append(packet.sender_info)
                await handle(packet)

            receiver._handle_rtp_packet, receiver._handle_rtcp_packet = rtp, rtcp
        answer = await (await client.post(f"/api/sessions/{made['id']}/webrtc", json={"type": "offer", "sdp": sdp})).json()
        await peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], "answer"))
        for _ in range(200):
            if all(len(reports.get(kind, ())) >= 3 for kind in ("audio", "video")):
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(reports)
        moments = {
            kind: [info.ntp_timestamp / 2**32 - ((info.rtp_timestamp - sent[kind] + 2**31) % 2**32 - 2**31) / rate for info in reports[kind]]
            for kind, rate in (("audio", 48_000), ("video", 90_000))
        }
        assert np.ptp(moments["audio"]) < 1e-3 and np.ptp(moments["video"]) < 1e-3, "one line, whatever held packets up"
        # An Opus decoder's first 312 samples (6.5 ms) are before the sound begins (RFC 7845, 4.2).
        assert moments["audio"][0] + 312 / 48_000 == pytest.approx(moments["video"][0], abs=1e-3)
        gaps = np.diff(came)
        assert np.mean((gaps > 0.008) & (gaps < 0.032)) > 0.5, "not two at once every 40 ms"
        await peer.close()

    served(run)


def test_lost_frames_are_lost_to_sound_and_picture_alike():
    encoder = FrameEncoder(64, 64, 25)
    found = {"video": [], "audio": []}
    for number in [*range(10), *range(40, 60)]:  # 30 frames that nobody took
        for packet in encoder.encode(Frame(number, np.zeros((64, 64, 3), np.uint8), np.zeros(1920, np.float32), 0, False, number / 25, 0.0)):
            found[packet.kind].append(float(packet.pts * packet.time_base))
    assert np.allclose(np.diff(found["video"]), [0.04] * 9 + [31 * 0.04] + [0.04] * 19)
    assert np.isclose(found["audio"][-1] + 312 / 48_000, 59 * 0.04 + 0.02, atol=0.021), "the second packet of the last frame, or the one before it"


def test_media_by_websocket_is_two_mp4_files_that_play():
    async def run(client, app):
        made = await created(client)
        files = {0: bytearray(), 1: bytearray()}
        async with client.ws_connect(f"/api/sessions/{made['id']}/video") as socket:
            for _ in range(150):
                data = (await asyncio.wait_for(socket.receive(), 10)).data
                files[data[0]] += data[1:]
        video = av.open(io.BytesIO(bytes(files[0])))
        pictures = [frame.pts * frame.time_base for frame in video.decode(video=0)]
        sound = av.open(io.BytesIO(bytes(files[1])))
        pieces = [frame.samples for frame in sound.decode(audio=0)]
        assert len(pictures) > 30 and np.allclose(np.diff([float(t) for t in pictures]), 0.04)
        assert sum(pieces) == pytest.approx(len(pictures) * 1920, abs=4 * 1920)

    served(run)


def test_players_open_a_transport_stream():
    async def run(client, app):
        made = await created(client)
        async with client.get(f"/api/sessions/{made['id']}/stream.ts") as answer:
            assert answer.headers["Content-Type"] == "video/mp2t"
            data = bytearray()
            while len(data) < 60_000:
                data += await asyncio.wait_for(answer.content.readany(), 10)
        with av.open(io.BytesIO(bytes(data)), format="mpegts") as file:
            assert {stream.codec_context.name for stream in file.streams} >= {"h264"}
            pictures = [float(frame.pts * frame.time_base) for frame in file.decode(video=0)]
        assert len(pictures) > 20 and np.allclose(np.diff(pictures), 0.04, atol=1e-3)
        await until(client, f"/api/sessions/{made['id']}", lambda report: report["viewers"] == 0)  # whoever hangs up is none

    served(run)


def test_numbers_survive_the_codec():
    from pikastream_jax.live.marks import Labeller, draw_number, read_number

    picture = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    for number in (0, 1, 123_456, 2**24 - 1):
        jpeg = io.BytesIO()
        Image.fromarray(draw_number(picture, number)).save(jpeg, "JPEG", quality=60)
        assert read_number(np.asarray(Image.open(jpeg))) == number
    assert read_number(np.zeros((256, 256, 3), np.uint8)) is None
    labelled = Labeller(256, 256)(picture)
    changed = (labelled != picture).any(axis=-1)
    assert changed[-30:, -120:].mean() > 0.1 and not changed[:200].any()


def test_a_recording_plays_and_says_what_it_is(tmp_path):
    async def run(client, app):
        made = await created(client, avatar="ada", prompt="calm")
        report = await until(client, f"/api/sessions/{made['id']}", lambda report: report["figures"]["frames"] >= 32)
        assert report["viewers"] == 0, "a recording is no viewer"
        await client.delete(f"/api/sessions/{made['id']}")

    served(run, recordings=tmp_path)
    (path,) = tmp_path.glob("*.mp4")
    with av.open(str(path)) as file:
        told = json.loads(file.metadata["comment"])
        assert len(list(file.decode(video=0))) >= 25
    beside = json.loads(path.with_suffix(".json").read_text())
    assert beside.pop("sha256") == hashlib.sha256(path.read_bytes()).hexdigest() and beside == told
    assert told["assertions"][0]["data"]["actions"][0]["digitalSourceType"].endswith("trainedAlgorithmicMedia")
    assert told["assertions"][1]["data"] == {"avatar": "ada", "prompt": "calm", "seed": 0, "uploaded_with_consent": False}


def test_a_disk_that_is_full_ends_the_recording_and_not_the_session(tmp_path, monkeypatch):
    from pikastream_jax.live import record

    def full(packet, *rest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "timed", full)

    async def run(client, app):
        made = await created(client)
        await until(client, f"/api/sessions/{made['id']}", lambda report: report["figures"]["frames"] > 15)
        await client.delete(f"/api/sessions/{made['id']}")

    served(run, recordings=tmp_path)
