"""Viewers by WebRTC, with their microphone as a voice: packets of the session's one encode, sent as they are.

aiortc would encode for each peer; given packets it only cuts them for RTP. Video and sound come from one queue, so a peer's first picture and its
first sound leave together.

What keeps lips and sound together in the browser is RTCP, whose sender reports say which media time belongs to which moment. aiortc reports the
timestamp of the packet that it sent last and when it did, so whatever held up that packet shifts one of the streams (a frame's second packet of sound, sent at once with the
first, by its 20 ms). Here both streams report one media clock, which is set at the peer's first report and never moved.
"""

import asyncio
import contextlib
import dataclasses
import logging
import re
import secrets

import av
import numpy as np
from aiortc import MediaStreamTrack, RTCPeerConnection, RTCRtpSender, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from aiortc.rtp import RtcpSenderInfo, RtcpSrPacket

from pikastream_jax.live.gate import SpeechGate
from pikastream_jax.live.media import SOUND_PIECE, Broadcast, Packet
from pikastream_jax.live.session import LiveSession
from pikastream_jax.live.voice import VoiceFull

_log = logging.getLogger(__name__)


class _Track(MediaStreamTrack):
    """Packets of one kind. Sound goes out evenly: two packets at once, every 40 ms, would look like jitter, for which browsers wait."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.queue: asyncio.Queue[Packet | None] = asyncio.Queue()
        self.last: Packet | None = None  # that was given to the sender
        self._next = 0.0  # when, by the loop's clock

    async def recv(self) -> av.Packet:
        packet = await self.queue.get()
        if packet is None:
            self.stop()
            raise MediaStreamError
        now = asyncio.get_running_loop().time
        if self.kind == "audio":
            if self.queue.empty() and (wait := self._next - now()) > 0:
                await asyncio.sleep(wait)
            self._next = now() + SOUND_PIECE
        sent = av.Packet(packet.data)
        sent.pts, sent.time_base = packet.pts, packet.time_base
        self.last = packet
        return sent


class _MediaClock:
    """The moments of media times, for both streams of a peer."""

    def __init__(self) -> None:
        self._zero: float | None = None  # seconds of NTP at which media time is 0

    def govern(self, sender: RTCRtpSender, track: _Track) -> None:
        """Puts the sender's reports on this clock. aiortc has no public way to: `_send_rtcp` is its one way out for them."""
        send = sender._send_rtcp

        async def send_on_clock(packets: list) -> None:
            for packet in packets:
                if isinstance(packet, RtcpSrPacket) and track.last is not None:
                    packet.sender_info = self._told(packet.sender_info, track.last)
            await send(packets)

        sender._send_rtcp = send_on_clock

    def _told(self, info: RtcpSenderInfo, last: Packet) -> RtcpSenderInfo:
        """The timestamp that belongs to the report's moment, from the one of the last packet."""
        moment, media = info.ntp_timestamp / 2**32, float(last.pts * last.time_base)
        if self._zero is None:
            self._zero = moment - media
        ahead = round((moment - self._zero - media) / last.time_base)
        return dataclasses.replace(info, rtp_timestamp=(info.rtp_timestamp + ahead) % 2**32)


class Peer:
    """One viewer. `answer` begins it, `close` ends it; `closed` is set when it is over."""

    def __init__(self, session: LiveSession, broadcast: Broadcast):
        self._session, self._broadcast = session, broadcast
        self._connection = RTCPeerConnection()
        self._tasks: list[asyncio.Task] = []
        self.name = secrets.token_urlsafe(6)
        self.closed = asyncio.Event()

    async def answer(self, offer: str) -> str:
        """SDP offer -> SDP answer, with the addresses of this machine.

        Raises:
          ValueError: no offer, or one without H.264.
        """
        connection = self._connection
        connection.on("connectionstatechange", self._state_changed)
        connection.on("track", self._heard)
        # Before the offer is read: aiortc settles on codecs there.
        tracks = {kind: _Track(kind) for kind in ("video", "audio")}
        video = connection.addTransceiver(tracks["video"], direction="sendonly")
        video.setCodecPreferences([codec for codec in RTCRtpSender.getCapabilities("video").codecs if codec.mimeType == "video/H264"])
        audio = connection.addTransceiver(tracks["audio"], direction="sendrecv")
        clock = _MediaClock()
        for transceiver in (video, audio):
            clock.govern(transceiver.sender, tracks[transceiver.kind])
        try:
            await connection.setRemoteDescription(RTCSessionDescription(offer, "offer"))
            await connection.setLocalDescription(await connection.createAnswer())
        except Exception as error:  # aiortc raises what its parser met
            await self.close()
            raise ValueError(f"this is no SDP offer that can be answered: {error}") from error
        answer = connection.localDescription.sdp
        if not re.search(r"a=rtpmap:\d+ H264/", answer):
            await self.close()
            raise ValueError("the offer asks for no video in H.264, which is what is sent: use a player that knows it, or the WebSocket")
        self._tasks.append(asyncio.create_task(self._feed(tracks)))
        return answer

    async def close(self) -> None:
        """Hangs up."""
        for task in self._tasks:
            task.cancel()
        self.closed.set()
        await self._connection.close()

    async def _feed(self, tracks: dict[str, _Track]) -> None:
        await self._connected()
        async for packet in self._broadcast.watch():
            if packet.kind in tracks:
                tracks[packet.kind].queue.put_nowait(packet)
        for track in tracks.values():
            track.queue.put_nowait(None)
        await self.close()

    async def _connected(self) -> None:
        while self._connection.connectionState != "connected":
            await asyncio.sleep(0.01)

    async def _state_changed(self) -> None:
        if self._connection.connectionState in ("failed", "closed", "disconnected"):
            await self.close()

    def _heard(self, track: MediaStreamTrack) -> None:
        if track.kind == "audio":
            self._tasks.append(asyncio.create_task(self._listen(track)))

    async def _listen(self, track: MediaStreamTrack) -> None:
        """The microphone, while somebody speaks into it."""
        gate = None
        with contextlib.suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                sound = frame.to_ndarray().astype(np.float32).reshape(-1, len(frame.layout.channels)).mean(axis=1) / 32768
                gate = gate or SpeechGate(frame.sample_rate)
                speech, ended = gate.push(sound)
                try:
                    if len(speech):
                        await self._session.push_audio(speech, frame.sample_rate)
                    if ended:
                        await self._session.end_utterance()
                except (VoiceFull, ValueError) as error:
                    _log.info("microphone: %s", error)
