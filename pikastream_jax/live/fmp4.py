"""Media over TCP, for places where UDP is blocked: fragmented MP4 by WebSocket, for a page's two source buffers.

A binary message is one byte that says which buffer (0: video, 1: sound) and a piece of that buffer's MP4, initialisation first. Video and sound are
files of their own, because Chromium takes of a file that holds both and a fragment for every frame only the key frames.
"""

import asyncio

import av
from aiohttp import WSMsgType, web

from pikastream_jax.live.media import Broadcast, Packet
from pikastream_jax.live.mux import mux_streams, timed
from pikastream_jax.serving.outputs import Collector

_FLAGS = "empty_moov+default_base_moof+frag_every_frame+skip_trailer"


class Fragments:
    """Packets of one kind as fragmented MP4."""

    def __init__(self, kind: str, height: int, width: int, fps: int, start: float):
        self._pieces, self._fps, self._start = Collector(), fps, start
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
