"""One encode of a session for everybody who watches: H.264 and Opus packets, handed to each viewer's queue.

Encoding runs in a thread of its own, frame by frame as they leave the session. A viewer who joins gets the next frame as a key frame. One who takes
packets too slowly loses all that wait, up to the next key frame, rather than lag behind or hold the others up.
"""

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from fractions import Fraction
from typing import Literal

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from pikastream_jax.live.session import Frame, LiveSession
from pikastream_jax.live.voice import SOUND_RATE
from pikastream_jax.serving.encode import VIDEO_CLOCK

WAITING = 100  # packets, of which 25 pictures and 50 pieces of sound make a second
SOUND_BITS = 64_000  # a second
SOUND_PIECE = 0.02  # seconds of an Opus packet


@dataclasses.dataclass(frozen=True)
class Packet:
    """Encoded media."""

    kind: Literal["video", "audio"]
    data: bytes  # H.264 in Annex B, or one Opus packet of `SOUND_PIECE`
    pts: int  # in VIDEO_CLOCK, or in SOUND_RATE
    key: bool  # a picture that needs none before it; sound always
    frame: Frame | None  # the picture's

    @property
    def time_base(self) -> Fraction:
        return Fraction(1, VIDEO_CLOCK if self.kind == "video" else SOUND_RATE)


class FrameEncoder:
    """Frames of one session to packets. Media time begins at the first frame.

    Args:
      mark: the picture of a frame with what is drawn into all of them.
    """

    def __init__(self, height: int, width: int, fps: int, mark: Callable[[Frame], np.ndarray] = lambda frame: frame.picture):
        self._mark = mark
        self._video = av.CodecContext.create("libx264", "w")
        self._video.height, self._video.width, self._video.pix_fmt = height, width, "yuv420p"
        self._video.time_base, self._video.framerate = Fraction(1, VIDEO_CLOCK), Fraction(fps)
        self._video.gop_size, self._video.thread_count = fps, 1
        # Annex B with parameter sets at every key frame, for whoever joins. Baseline is what every browser's WebRTC takes.
        self._video.options = {"preset": "superfast", "tune": "zerolatency", "crf": "23", "profile": "baseline", "x264-params": "repeat-headers=1:annexb=1:sc_threshold=0"}
        self._audio = av.CodecContext.create("libopus", "w")
        self._audio.sample_rate, self._audio.layout, self._audio.format = SOUND_RATE, "mono", "flt"
        self._audio.bit_rate, self._audio.time_base = SOUND_BITS, Fraction(1, SOUND_RATE)
        self._audio.options = {"application": "audio", "frame_duration": f"{1e3 * SOUND_PIECE:g}"}
        self._fifo = av.AudioFifo()
        self._reformatter = VideoReformatter()
        self._first: int | None = None
        self._samples = 0
        self._fps = fps

    def encode(self, frame: Frame, key: bool = False) -> list[Packet]:
        """Packets of a frame and its sound.

        Args:
          key: make it a key frame.
        """
        if self._first is None:
            self._first = frame.number
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(self._mark(frame)), format="rgb24")
        picture = self._reformatter.reformat(picture, format="yuv420p", dst_colorspace="itu601")
        picture.pts, picture.time_base = round((frame.number - self._first) * VIDEO_CLOCK / self._fps), Fraction(1, VIDEO_CLOCK)
        picture.pict_type = PictureType.I if key else PictureType.NONE
        packets = [Packet("video", bytes(packet), packet.pts, packet.is_keyframe, frame) for packet in self._video.encode(picture)]
        sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(frame.sound, np.float32).reshape(1, -1), format="flt", layout="mono")
        sound.sample_rate = SOUND_RATE
        piece_samples = round(SOUND_RATE * SOUND_PIECE)
        missing = round((frame.number - self._first) * SOUND_RATE / self._fps) - self._samples - self._fifo.samples
        if missing >= piece_samples:  # of frames that nobody took in time: the sound's clock passes over them as the picture's does
            self._samples += missing
        self._fifo.write(sound)
        while (piece := self._fifo.read(piece_samples)) is not None:
            piece.pts, piece.time_base = self._samples, Fraction(1, SOUND_RATE)
            self._samples += piece.samples
            packets += [Packet("audio", bytes(packet), packet.pts, True, None) for packet in self._audio.encode(piece)]
        return packets


class Viewer:
    """A queue of packets, from a key frame on."""

    def __init__(self) -> None:
        self._packets: asyncio.Queue[Packet | None] = asyncio.Queue()
        self._started = False
        self.lost = 0  # packets

    def offer(self, packet: Packet) -> bool:
        """Takes a packet; returns whether a key frame is wanted."""
        if not self._started:
            if packet.kind != "video" or not packet.key:
                return True
            self._started = True
        if self._packets.qsize() >= WAITING:
            self.lost += self._packets.qsize()
            while not self._packets.empty():
                self._packets.get_nowait()
            self._started = False
            return True
        self._packets.put_nowait(packet)
        return False

    def end(self) -> None:
        """No more packets come."""
        self._packets.put_nowait(None)

    async def take(self) -> Packet | None:
        """The next packet; None at the end."""
        return await self._packets.get()


class Broadcast:
    """Encodes a session and gives its packets to viewers; frames are taken from the session whether anybody watches or not."""

    def __init__(self, session: LiveSession, encoder: FrameEncoder, seen: Callable[[Frame], None] = lambda frame: None):
        self._session, self._encoder, self._seen = session, encoder, seen
        self._viewers: set[Viewer] = set()
        self._key = True
        self.ended = asyncio.Event()
        self.failure: Exception | None = None
        self._encoding: deque[float] = deque(maxlen=250)
        self._task = asyncio.create_task(self._run())

    @property
    def viewers(self) -> int:
        return len(self._viewers)

    @property
    def fps(self) -> int:
        return self._session.model.fps

    @property
    def encode_seconds(self) -> float:
        """What encoding a frame and its sound took lately, by the median."""
        return float(np.median(self._encoding)) if self._encoding else 0.0

    async def watch(self) -> AsyncIterator[Packet]:
        """Packets from the next key frame on, which is made at once."""
        viewer = self.join()
        try:
            while (packet := await viewer.take()) is not None:
                yield packet
        finally:
            self.leave(viewer)

    def join(self) -> Viewer:
        viewer = Viewer()
        self._viewers.add(viewer)
        self._key = True
        if self.ended.is_set():
            viewer.end()
        return viewer

    def leave(self, viewer: Viewer) -> None:
        self._viewers.discard(viewer)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async for frame in self._session.frames():
                key, self._key = self._key, False
                began = time.perf_counter()
                packets = await loop.run_in_executor(None, self._encoder.encode, frame, key)
                self._encoding.append(time.perf_counter() - began)
                self._seen(frame)
                for viewer in tuple(self._viewers):
                    wanted = [viewer.offer(packet) for packet in packets]
                    self._key = self._key or wanted[-1]
        except Exception as error:
            self.failure = error
        finally:
            self.ended.set()
            for viewer in self._viewers:
                viewer.end()
