"""Frames and sound to H.264 and AAC or Opus packets on one media clock."""

import dataclasses
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float32, UInt8

from pikastream_jax.serving.chunks import MASTER_RATE

VIDEO_CLOCK = 90_000  # Hz, of MPEG-TS and RTP
_BT601 = 6  # the matrix that swscale uses from RGB; written into the stream so that no player has to guess
_SRGB_PRIMARIES = 1


@dataclasses.dataclass(frozen=True)
class MediaFormat:
    """What is sent."""

    height: int  # pixels, even
    width: int  # pixels, even
    fps: Fraction
    channels: int  # 1 or 2, at MASTER_RATE


def add_video(container: av.container.OutputContainer, media: MediaFormat, repeat_headers: bool = False):
    """Adds an H.264 stream that a player can join within a second and that holds no frame back.

    repeat_headers: parameter sets before every key frame, for receivers that come late (RTP).
    """
    gop = max(1, int(media.fps))  # a key frame at least every second
    options = {"preset": "veryfast", "tune": "zerolatency", "crf": "20", "sc_threshold": "0"}
    if repeat_headers:
        options["x264-params"] = "repeat-headers=1"
    stream = container.add_stream("libx264", rate=media.fps, options=options)
    stream.height, stream.width = media.height, media.width
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = Fraction(1, VIDEO_CLOCK)
    context.gop_size = gop
    # zerolatency cuts a picture into one slice per thread, and the model needs the cores more: small ones get one.
    context.thread_count = 1 if media.height * media.width <= 512**2 else 2
    context.colorspace, context.color_range = _BT601, av.video.reformatter.ColorRange.MPEG
    context.color_primaries = context.color_trc = _SRGB_PRIMARIES
    return stream


def add_audio(container: av.container.OutputContainer, media: MediaFormat, codec: str):
    """Adds an audio stream; codec: `aac` or `libopus`."""
    stream = container.add_stream(codec, rate=MASTER_RATE)
    stream.layout = "mono" if media.channels == 1 else "stereo"
    stream.bit_rate = 64_000 + 32_000 * media.channels
    stream.codec_context.time_base = Fraction(1, MASTER_RATE)
    stream.format = "fltp" if codec == "aac" else "flt"  # AAC takes a plane per channel, Opus interleaved samples
    return stream


class Encoder:
    """Encodes chunk by chunk; time stamps come from frame numbers and sample counts, never from a wall clock.

    The audio encoder's delay (AAC 1,024 samples, Opus 312) shows as negative time stamps of its first packets, so
    that sound and picture stay together.
    """

    def __init__(self, video, audio, media: MediaFormat):
        """video, audio: streams of `add_video` and `add_audio`, whose containers have started."""
        self._video, self._audio, self._media = video, audio, media
        self._reformatter = VideoReformatter()
        self._samples = 0

    def encode(
        self,
        frames: Iterable[tuple[int, UInt8[np.ndarray, "h w 3"]]],
        sound: Float32[np.ndarray, "n channels"],
    ) -> list[av.Packet]:
        """Packets of (frame number, picture) pairs and of the sound beside them, in order of time."""
        packets = []
        for number, picture in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = self._reformatter.reformat(
                frame,
                self._media.width,
                self._media.height,
                "yuv420p",
                dst_colorspace="itu601",
                interpolation="LANCZOS",
            )
            frame.pts, frame.time_base = round(number / self._media.fps * VIDEO_CLOCK), Fraction(1, VIDEO_CLOCK)
            packets += self._video.encode(frame)
        if len(sound):
            packed = np.ascontiguousarray(sound, np.float32)
            planar = self._audio.format.is_planar
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(packed.T) if planar else packed.reshape(1, -1),
                format=self._audio.format.name,
                layout=self._audio.layout.name,
            )
            frame.sample_rate, frame.pts, frame.time_base = MASTER_RATE, self._samples, Fraction(1, MASTER_RATE)
            self._samples += len(sound)
            packets += self._audio.encode(frame)
        return self._in_order(packets)

    def finish(self) -> list[av.Packet]:
        """What the encoders still hold."""
        return self._in_order(self._video.encode(None) + self._audio.encode(None))

    def _in_order(self, packets: list[av.Packet]) -> list[av.Packet]:
        for packet in packets:
            if packet.stream is self._video and not packet.duration:  # x264 leaves it open
                packet.duration = round(VIDEO_CLOCK / self._media.fps)
        return sorted(packets, key=packet_time)


def packet_time(packet: av.Packet) -> Fraction:
    """Decoding time in seconds of media time. Ask before muxing, which moves the stamps to the container's clock."""
    return packet.dts * packet.time_base
