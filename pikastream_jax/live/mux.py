"""Packets of a session's one encode, put into containers."""

from collections.abc import AsyncIterator, Sequence

import av

from pikastream_jax.live.media import Broadcast, Packet
from pikastream_jax.live.voice import SOUND_RATE
from pikastream_jax.serving.encode import VIDEO_CLOCK
from pikastream_jax.serving.outputs import LIVE, Collector


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


async def transport_stream(broadcast: Broadcast) -> AsyncIterator[bytes]:
    """MPEG-TS, piece by piece as packets come, until the session ends: what ffplay, VLC and OBS open by its address, or read from a pipe."""
    data, container, start = Collector(), None, 0.0
    async for packet in broadcast.watch():
        if container is None:
            start = float(packet.pts * packet.time_base)
            container = av.open(data, "w", format="mpegts", options=LIVE)
            streams = mux_streams(container, ("video", "audio"), *packet.frame.picture.shape[:2], broadcast.fps)
        container.mux(timed(packet, streams[packet.kind], start, broadcast.fps))
        if piece := data.take():
            yield piece
