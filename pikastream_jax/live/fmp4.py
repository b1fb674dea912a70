"""Media over TCP, for places where UDP is blocked: fragmented MP4 by WebSocket for a page's two source buffers, MPEG-TS by HTTP for players.

A binary message is one byte that says which buffer (0: video, 1: sound) and a piece of that buffer's MP4, initialisation first. Video and sound are
files of their own, because Chromium takes of a file that holds both and a fragment for every frame only the key frames.
"""

import asyncio
from collections.abc import Sequence

import av
from aiohttp import WSMsgType, web

from pikastream_jax.live.media import Broadcast, Packet
from pikastream_jax.live.voice import SOUND_RATE
from pikastream_jax.serving.encode import VIDEO_CLOCK

_FLAGS = "empty_moov+default_base_moof+frag_every_frame+skip_trailer"


class _Pieces:
    """A file for PyAV to write into."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        data, self._data = bytes(self._data), bytearray()
        return data


def mux_streams(container: av.container.OutputContainer, kinds: Sequence[str], height: int, width: int, fps: int) -> dict[str, av.stream.Stream]:
    """Streams of a container for packets that are encoded elsewhere; encoders of the same settings are opened for their headers alone."""
    streams = {}
    if "video" in kinds:
        streams["video"] = video = container.add_stream("libx264", rate=fps, options={"profile": "baseline", "tune": "zerolatency", "preset": "superfast"})
        video.height, video.width, video.pix_fmt = height, width, "yuv420p"
    if "audio" in kinds:
        streams["audio"] = audio = container.add_stream("libopus", rate=SOUND_RATE)
        audio.layout, audio.format = "mono", "flt"
    container.start_encoding()
    return streams


def timed(packet: Packet, stream: av.stream.Stream, start: float, fps: int) -> av.Packet:
    """A packet for such a stream.

    Args:
      start: media time, in seconds, at which the file begins.
    """
    sent = av.Packet(packet.data)
    sent.stream, sent.time_base = stream, packet.time_base
    sent.pts = sent.dts = max(0, packet.pts - round(start / packet.time_base))
    sent.duration = VIDEO_CLOCK // fps if packet.kind == "video" else SOUND_RATE // 50
    sent.is_keyframe = packet.key
    return sent


class Fragments:
    """Packets of one kind as fragmented MP4."""

    def __init__(self, kind: str, height: int, width: int, fps: int, start: float):
        self._pieces, self._fps, self._start = _Pieces(), fps, start
        self._container = av.open(self._pieces, "w", format="mp4", options={"movflags": _FLAGS, "flush_packets": "1"})
        self._stream = mux_streams(self._container, (kind,), height, width, fps)[kind]

    def add(self, packet: Packet) -> bytes:
        """The next piece."""
        self._container.mux(timed(packet, self._stream, self._start, self._fps))
        return self._pieces.take()


async def video_socket(request: web.Request, broadcast: Broadcast) -> web.WebSocketResponse:
    """Sends packets until the viewer or the session goes away."""
    socket = web.WebSocketResponse(heartbeat=20, max_msg_size=2**16)
    await socket.prepare(request)

    async def send() -> None:
        files: dict[str, Fragments] = {}
        async for packet in broadcast.watch():
            if not files:
                start = float(packet.pts * packet.time_base)
                size = packet.frame.picture.shape[:2]
                files = {kind: Fragments(kind, *size, broadcast.fps, start) for kind in ("video", "audio")}
            await socket.send_bytes(bytes([packet.kind == "audio"]) + files[packet.kind].add(packet))
        await socket.close()

    sender = asyncio.create_task(send())
    try:
        async for message in socket:  # nothing is expected: only the closing
            if message.type in (WSMsgType.CLOSE, WSMsgType.ERROR):
                break
    finally:
        sender.cancel()
    return socket


async def transport_stream(request: web.Request, broadcast: Broadcast) -> web.StreamResponse:
    """MPEG-TS without end, which ffplay, VLC and OBS open by its address."""
    response = web.StreamResponse(headers={"Content-Type": "video/mp2t", "Cache-Control": "no-store"})
    await response.prepare(request)
    pieces, container, start = _Pieces(), None, 0.0
    async for packet in broadcast.watch():
        if container is None:
            start = float(packet.pts * packet.time_base)
            options = {"flush_packets": "1", "max_interleave_delta": "1", "pes_payload_size": "0"}
            container = av.open(pieces, "w", format="mpegts", options=options)
            streams = mux_streams(container, ("video", "audio"), *packet.frame.picture.shape[:2], broadcast.fps)
        container.mux(timed(packet, streams[packet.kind], start, broadcast.fps))
        if data := pieces.take():
            await response.write(data)
    await response.write_eof()
    return response
