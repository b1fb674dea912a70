"""A session as two RTP streams, for GStreamer, FFmpeg, VLC or a media server.

By HTTP they go to the machine that asks and to no other: whoever could name the target could have somebody else flooded. The command line may name any.
"""

import asyncio
import contextlib
import logging
import time

import av

from pikastream_jax.live.media import Broadcast
from pikastream_jax.live.mux import mux_streams, timed
from pikastream_jax.serving.rtp import AUDIO_PORT_OFFSET, Destination, parameter_sets, rtp_options, session_description

_log = logging.getLogger(__name__)


class RtpViewer:
    """One receiver, from the next key frame on until the session ends or it is closed.

    Args:
      destination: where it listens; sound goes to the port after the next.
    """

    def __init__(self, broadcast: Broadcast, destination: Destination):
        self._broadcast, self.destination = broadcast, destination
        self._described: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._send())

    async def description(self) -> str:
        """The SDP, as soon as there is a picture.

        Raises:
          RuntimeError: the session ended before there was one, or the network refuses.
        """
        return await asyncio.shield(self._described)

    @property
    def over(self) -> bool:
        """Whether nothing more is sent."""
        return self._task.done()

    async def ended(self) -> None:
        """Waits until nothing more is sent."""
        await asyncio.wait([self._task])

    async def close(self) -> None:
        """Sends no more, but a goodbye."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _send(self) -> None:
        containers, streams, start, fps = {}, {}, 0.0, self._broadcast.fps
        try:
            async for packet in self._broadcast.watch():
                if not containers:  # the first one is a key frame
                    start, size = float(packet.pts * packet.time_base), packet.frame.picture.shape[:2]
                    options = rtp_options(time.time_ns())
                    for kind, offset in (("video", 0), ("audio", AUDIO_PORT_OFFSET)):
                        containers[kind] = av.open(self.destination.url(offset), "w", format="rtp", options=options)
                        streams |= mux_streams(containers[kind], (kind,), *size, fps)
                    self._described.set_result(session_description(self.destination, fps, 1, parameter_sets(packet.data)))
                containers[packet.kind].mux(timed(packet, streams[packet.kind], start, fps))
        except (OSError, av.FFmpegError) as error:
            _log.warning("RTP to %s ended: %s", self.destination.url(0), error)
            self._fail(f"cannot send to {self.destination.url(0)}: {error.strerror or error}")
        finally:
            self._fail("the session has ended")
            for container in containers.values():
                with contextlib.suppress(OSError, av.FFmpegError):
                    container.close()

    def _fail(self, reason: str) -> None:
        if not self._described.done():
            self._described.set_exception(RuntimeError(reason))
            self._described.exception()  # whether or not anybody waits for it
