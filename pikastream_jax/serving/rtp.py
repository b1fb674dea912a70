"""RTP: one session for the picture, one for the sound, and the SDP file that tells a player about both.

H.264 is packed as RFC 6184 (packetization-mode 1), Opus as RFC 7587. Receivers put the two together by the RTCP
sender reports, which tie both RTP clocks to one wall clock.
"""

import base64
import dataclasses
import ipaddress
import socket
import time
from fractions import Fraction
from pathlib import Path
from urllib.parse import urlsplit

import av

from pikastream_jax.serving.encode import MediaFormat, add_audio, add_video
from pikastream_jax.serving.errors import ServeError
from pikastream_jax.serving.outputs import write_whole

_PACKET_BYTES = 1200  # below any usual MTU, tunnels included
_VIDEO_TYPE, _AUDIO_TYPE = 96, 97  # dynamic RTP payload types
AUDIO_PORT_OFFSET = 2  # RTP takes the even port, its RTCP the odd one above


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where to send."""

    address: str  # numeric IPv4 or IPv6
    port: int  # of the video; audio is at port + AUDIO_PORT_OFFSET

    def url(self, offset: int) -> str:
        """RTP URL of the session at `port + offset`."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"rtp://{host}:{self.port + offset}?pkt_size={_PACKET_BYTES}"


def parse_destination(url: str) -> Destination:
    """`rtp://HOST:PORT` -> numbers.

    Raises:
      ServeError: the URL has another form, the port is out of range, or the host has no address.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ServeError(f"output {url} is not rtp://HOST:PORT ({error})") from error
    if not host or not port or parts.path not in ("", "/") or parts.query:
        raise ServeError(f"output {url} is not rtp://HOST:PORT; for example rtp://127.0.0.1:5004")
    try:
        return destination_of(host, port)
    except ServeError as error:
        raise ServeError(f"output {url}: {error}") from error


def destination_of(host: str, port: int) -> Destination:
    """Raises ServeError: the port is out of range, or the host has no address."""
    limit = 65535 - AUDIO_PORT_OFFSET - 1
    if not 1 <= port <= limit:
        raise ServeError(f"port {port} leaves no room for the sound; use 1 to {limit}")
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][4][0]
    except OSError as error:
        raise ServeError(f"host {host} has no address ({error.strerror})") from error
    return Destination(str(address), port)


def session_description(destination: Destination, fps: Fraction | int, channels: int, sets: list[bytes]) -> str:
    """The SDP (RFC 8866) of both sessions.

    Args:
      sets: H.264 SPS and PPS, without start codes, so that a player can decode from the first key frame.
    """
    family = "IP6" if ipaddress.ip_address(destination.address).version == 6 else "IP4"
    profile, encoded = sets[0][1:4].hex(), ",".join(base64.b64encode(nal).decode() for nal in sets)
    lines = [
        "v=0",
        f"o=- {time.time_ns() // 10**9} 1 IN {family} {destination.address}",
        "s=PikaStream",
        f"c=IN {family} {destination.address}",
        "t=0 0",
        f"m=video {destination.port} RTP/AVP {_VIDEO_TYPE}",
        f"a=rtpmap:{_VIDEO_TYPE} H264/90000",
        f"a=fmtp:{_VIDEO_TYPE} packetization-mode=1;profile-level-id={profile};sprop-parameter-sets={encoded}",
        f"a=framerate:{float(fps):g}",
        "a=sendonly",
        f"m=audio {destination.port + AUDIO_PORT_OFFSET} RTP/AVP {_AUDIO_TYPE}",
        f"a=rtpmap:{_AUDIO_TYPE} opus/48000/2",  # always 2: RFC 7587, section 7
        f"a=fmtp:{_AUDIO_TYPE} sprop-stereo={channels - 1}",
        "a=sendonly",
    ]
    return "\r\n".join(lines) + "\r\n"


class RtpOutput:
    """Two RTP sessions and their SDP file."""

    def __init__(self, destination: Destination, sdp: Path, media: MediaFormat):
        """Raises ServeError: the network or the SDP file refuses."""
        self._sdp, self._closed = sdp, False
        options = rtp_options(time.time_ns())
        self._containers = []
        try:
            for offset in (0, AUDIO_PORT_OFFSET):
                self._containers.append(av.open(destination.url(offset), "w", format="rtp", options=options))
            self.video = add_video(self._containers[0], media, repeat_headers=True)
            self.video.codec_context.flags |= av.codec.context.Flags.global_header  # x264 tells its parameter sets now
            self.audio = add_audio(self._containers[1], media, "libopus")
            for container in self._containers:
                container.start_encoding()
            write_whole(sdp, session_description(destination, media.fps, media.channels, parameter_sets(self.video.codec_context.extradata)))
        except (OSError, av.FFmpegError) as error:
            self._close_containers()
            raise ServeError(f"cannot send to {destination.url(0)}: {error.strerror or error}") from error

    def write(self, packet: av.Packet) -> None:
        try:
            self._containers[0 if packet.stream is self.video else 1].mux(packet)
        except (OSError, av.FFmpegError) as error:
            raise ServeError(f"cannot send over RTP: {error.strerror or error}") from error

    def close(self) -> None:
        self._close_containers()
        self._closed = True

    def discard(self) -> None:
        if not self._closed:
            self._close_containers()
            self._sdp.unlink(missing_ok=True)

    def _close_containers(self) -> None:
        for container in self._containers:
            container.close()


def rtp_options(begun: int) -> dict[str, str]:
    """Options of both sessions' muxers.

    Args:
      begun: wall-clock time of media time 0, in nanoseconds: it goes into the sender reports of both.
    """
    return {
        "start_time_realtime": str(begun // 1000),
        # FFmpeg would otherwise move a stream that starts below zero (Opus does) up to zero, and part it from the picture.
        "avoid_negative_ts": "disabled",
        "rtpflags": "send_bye",  # players then end with the stream instead of waiting for more
    }


def parameter_sets(data: bytes) -> list[bytes]:
    """SPS and PPS out of x264's header or a key frame with it (Annex B: each unit after a 00 00 01 or 00 00 00 01)."""
    units = [unit.strip(b"\0") for unit in data.split(b"\0\0\1")]
    return [unit for unit in units if unit and unit[0] & 0x1F in (7, 8)]
