"""Media over one WebSocket, for places where UDP is blocked: fragmented MP4 for a page's two source buffers.

A binary message is one byte that says which buffer (0: video, 1: sound) and a piece of that buffer's MP4, initialisation first. Video and sound are
files of their own, because Chromium takes of a file that holds both and a fragment for every frame only the key frames.
"""

import asyncio

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


class Fragments:
    """Packets of one kind as fragmented MP4."""

    def __init__(self, kind: str, height: int = 0, width: int = 0, fps: int = 25):
        self._pieces, self._kind = _Pieces(), kind
        self._container = av.open(self._pieces, "w", format="mp4", options={"movflags": _FLAGS, "flush_packets": "1"})
        # An encoder of the same settings is opened for its headers alone; what is muxed was encoded before.
        if kind == "video":
            self._stream = self._container.add_stream("libx264", rate=fps, options={"profile": "baseline", "tune": "zerolatency", "preset": "superfast"})
            self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
            self._duration = VIDEO_CLOCK // fps
        else:
            self._stream = self._container.add_stream("libopus", rate=SOUND_RATE)
            self._stream.layout, self._stream.format = "mono", "flt"
            self._duration = SOUND_RATE // 50
        self._container.start_encoding()

    def add(self, packet: Packet, start: int) -> bytes:
        """The next piece.

        Args:
          start: time stamp, in the packet's clock, that the file begins with.
        """
        sent = av.Packet(packet.data)
        sent.stream, sent.time_base = self._stream, packet.time_base
        sent.pts = sent.dts = max(0, packet.pts - start)
        sent.duration, sent.is_keyframe = self._duration, packet.key
        self._container.mux(sent)
        return self._pieces.take()


async def video_socket(request: web.Request, broadcast: Broadcast) -> web.WebSocketResponse:
    """Sends packets until the viewer or the session goes away."""
    socket = web.WebSocketResponse(heartbeat=20, max_msg_size=2**16)
    await socket.prepare(request)

    async def send() -> None:
        files: dict[str, Fragments] = {}
        start = 0.0  # seconds of media time
        async for packet in broadcast.watch():
            if not files:
                start = float(packet.pts * packet.time_base)
                picture = packet.frame.picture
                files = {"video": Fragments("video", *picture.shape[:2], broadcast.fps), "audio": Fragments("audio")}
            piece = files[packet.kind].add(packet, round(start / packet.time_base))
            await socket.send_bytes(bytes([packet.kind == "audio"]) + piece)
        await socket.close()

    sender = asyncio.create_task(send())
    try:
        async for message in socket:  # nothing is expected: only the closing
            if message.type in (WSMsgType.CLOSE, WSMsgType.ERROR):
                break
    finally:
        sender.cancel()
    return socket
