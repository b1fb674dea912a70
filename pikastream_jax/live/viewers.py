"""Routes of those who watch: WebRTC, WHEP, MP4 by WebSocket, MPEG-TS and RTP, all from a session's one encode."""

import contextlib

from aiohttp import web

from pikastream_jax.live.fmp4 import video_socket
from pikastream_jax.live.forms import asked, known, whole_number
from pikastream_jax.live.hub import HUB, Refused, Room
from pikastream_jax.live.mux import transport_stream
from pikastream_jax.live.rtp import RtpViewer
from pikastream_jax.live.webrtc import Peer
from pikastream_jax.serving.errors import ServeError
from pikastream_jax.serving.rtp import destination_of


def viewer_routes() -> list[web.RouteDef]:
    """Routes under a session."""
    return [
        web.get("/api/sessions/{id}/video", _video),
        web.get("/api/sessions/{id}/stream.ts", _stream),
        web.post("/api/sessions/{id}/webrtc", _webrtc),
        web.post("/api/sessions/{id}/whep", _whep),
        web.delete("/api/sessions/{id}/whep/{peer}", _whep_end),
        web.post("/api/sessions/{id}/rtp", _rtp),
        web.delete("/api/sessions/{id}/rtp/{port}", _rtp_end),
    ]


async def _video(request: web.Request) -> web.StreamResponse:
    return await video_socket(request, _seat(request).broadcast)


async def _stream(request: web.Request) -> web.StreamResponse:
    """MPEG-TS without end, which ffplay, VLC and OBS open by its address."""
    room = _seat(request)
    response = web.StreamResponse(headers={"Content-Type": "video/mp2t", "Cache-Control": "no-store"})
    await response.prepare(request)
    async with contextlib.aclosing(transport_stream(room.broadcast)) as pieces:
        async for piece in pieces:
            await response.write(piece)
    await response.write_eof()
    return response


async def _webrtc(request: web.Request) -> web.Response:
    fields, _ = await asked(request)
    if fields.get("type") != "offer" or not isinstance(fields.get("sdp"), str):
        raise Refused(422, "send {type: offer, sdp: ...}")
    peer, answer = await _connect(request, fields["sdp"])
    return web.json_response({"type": "answer", "sdp": answer, "peer": peer})


async def _whep(request: web.Request) -> web.Response:
    """WHEP (draft-ietf-wish-whep): an SDP offer for an SDP answer, so that OBS, GStreamer and other players can watch."""
    if request.content_type != "application/sdp":
        raise Refused(415, f"the body is {request.content_type}: send application/sdp")
    peer, answer = await _connect(request, await request.text())
    return web.Response(status=201, text=answer, content_type="application/sdp", headers={"Location": f"{request.path}/{peer}"})


async def _whep_end(request: web.Request) -> web.Response:
    room = _room(request)
    for peer in tuple(room.peers):
        if peer.name == request.match_info["peer"]:
            await peer.close()
            room.peers.discard(peer)
            return web.Response(status=200)
    raise Refused(404, "there is no such viewer: it has left, or never was")


async def _rtp(request: web.Request) -> web.Response:
    """RTP to a port of the machine that asks, and the SDP that describes it."""
    fields, _ = await asked(request)
    known(fields, ("port",))
    port = whole_number(fields.get("port"), "port")
    room = _seat(request)
    try:
        destination = destination_of(request.app[HUB].client(request), port)
    except ServeError as error:
        raise Refused(422, str(error)) from error
    if any(viewer.destination == destination for viewer in room.receivers):
        raise Refused(409, f"port {port} is sent to already: end that first")
    viewer = RtpViewer(room.broadcast, destination)
    room.receivers.add(viewer)
    text = await viewer.description()
    return web.Response(status=201, text=text, content_type="application/sdp", headers={"Location": f"{request.path}/{port}"})


async def _rtp_end(request: web.Request) -> web.Response:
    room, client = _room(request), request.app[HUB].client(request)
    for viewer in tuple(room.receivers):
        if str(viewer.destination.port) == request.match_info["port"] and viewer.destination.address == client:
            await viewer.close()
            room.receivers.discard(viewer)
            return web.Response(status=204)
    raise Refused(404, "nothing is sent there")


async def _connect(request: web.Request, offer: str) -> tuple[str, str]:
    room = _seat(request)
    peer = Peer(room.session, room.broadcast)
    try:
        answer = await peer.answer(offer)
    except ValueError as error:
        raise Refused(422, str(error)) from error
    room.peers.add(peer)
    return peer.name, answer


def _room(request: web.Request) -> Room:
    return request.app[HUB].find(request.match_info["id"])


def _seat(request: web.Request) -> Room:
    """The session, if one more may watch it."""
    room = _room(request)
    room.forget_those_who_left()
    limit = request.app[HUB].limits.viewers
    if max(room.watchers, len(room.peers) + len(room.receivers)) >= limit:
        raise Refused(429, f"{limit} viewers of one session are the most", 5)
    return room
