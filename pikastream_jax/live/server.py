"""The service over HTTP: sessions, their media, their changes, and the page that shows all of it.

aiohttp rather than a framework with an ASGI server: one dependency, and WebSockets and aiortc live in the same event loop. The routes are described in `openapi.json`
beside this file, which a test holds against what is registered here.
"""

import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web

from pikastream_jax.live.access import Access
from pikastream_jax.live.engine import Engine
from pikastream_jax.live.fmp4 import transport_stream, video_socket
from pikastream_jax.live.hub import Hub, Limits, Refused, Room
from pikastream_jax.live.voice import VoiceFull
from pikastream_jax.live.webrtc import Peer
from pikastream_jax.serving.errors import ServeError
from pikastream_jax.serving.image import avatar_names, avatar_path

_log = logging.getLogger(__name__)
HUB: web.AppKey[Hub] = web.AppKey("hub", Hub)
_ASSETS = resources.files("pikastream_jax.live") / "page"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_PAGE_RULES = "default-src 'self'; connect-src 'self' ws: wss:; media-src 'self' blob:; img-src 'self' blob: data:; frame-ancestors 'none'"


def application(engine: Engine, access: Access, limits: Limits, *, label: bool = True, numbers: bool = False, recordings: Path | None = None) -> web.Application:
    """The service of an engine; the engine is not its to close.

    Args:
      label, numbers, recordings: see `Hub`.
    """
    app = web.Application(client_max_size=limits.image_bytes + 2**16, middlewares=[_errors, access.middleware])

    async def hub(app: web.Application):
        app[HUB] = Hub(engine, limits, label=label, numbers=numbers, recordings=recordings)
        yield
        await app[HUB].shut()

    app.cleanup_ctx.append(hub)
    app.add_routes(
        [
            web.get("/", _page),
            web.get("/page/{name}", _page),
            web.get("/health", _health),
            web.get("/ready", _ready),
            web.get("/metrics", _metrics),
            web.get("/openapi.json", _openapi),
            web.get("/api/avatars", _avatars),
            web.get("/api/avatars/{name}", _avatar),
            web.post("/api/sessions", _create),
            web.get("/api/sessions/{id}", _read),
            web.patch("/api/sessions/{id}", _update),
            web.delete("/api/sessions/{id}", _delete),
            web.post("/api/sessions/{id}/interrupt", _interrupt),
            web.get("/api/sessions/{id}/audio", _audio),
            web.get("/api/sessions/{id}/video", _video),
            web.get("/api/sessions/{id}/stream.ts", _stream),
            web.post("/api/sessions/{id}/webrtc", _webrtc),
            web.post("/api/sessions/{id}/whep", _whep),
            web.delete("/api/sessions/{id}/whep/{peer}", _whep_end),
        ]
    )
    return app


@web.middleware
async def _errors(request: web.Request, handler) -> web.StreamResponse:
    """Whatever is refused becomes JSON with its reason."""
    try:
        return await handler(request)
    except Refused as refused:
        headers = {"Retry-After": str(refused.retry_after)} if refused.retry_after else {}
        return web.json_response({"error": str(refused)}, status=refused.status, headers=headers)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return web.json_response({"error": error.text or error.reason}, status=error.status, headers={"Allow": error.headers["Allow"]} if "Allow" in error.headers else {})
    except RuntimeError as error:  # the engine or the session is gone
        _log.warning("%s %s: %s", request.method, request.path, error)
        return web.json_response({"error": str(error)}, status=503)


async def _page(request: web.Request) -> web.Response:
    name = request.match_info.get("name", "index.html")
    if name not in ("index.html", "app.js", "style.css"):
        raise Refused(404, f"there is no {name!r}")
    kind = _TYPES[name[name.rindex(".") :]]
    headers = {"Content-Security-Policy": _PAGE_RULES, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return web.Response(text=(_ASSETS / name).read_text(), content_type=kind, headers=headers)


async def _health(request: web.Request) -> web.Response:
    engine = request.app[HUB].engine
    alive = engine.failure is None
    return web.json_response({"status": "ok" if alive else f"failed: {engine.failure}", "sessions": len(engine.sessions), "capacity": engine.capacity}, status=200 if alive else 500)


async def _ready(request: web.Request) -> web.Response:
    engine = request.app[HUB].engine
    free = engine.capacity - len(engine.sessions)
    ready = engine.failure is None and free > 0
    return web.json_response({"ready": ready, "free": max(0, free)}, status=200 if ready else 503)


async def _metrics(request: web.Request) -> web.Response:
    return web.Response(text=metrics(request.app[HUB]), content_type="text/plain", charset="utf-8")


def metrics(hub: Hub) -> str:
    """Prometheus's text format."""
    engine, steps = hub.engine, hub.engine.steps
    lines = [
        "# TYPE pikastream_sessions gauge",
        f"pikastream_sessions {len(engine.sessions)}",
        "# TYPE pikastream_capacity gauge",
        f"pikastream_capacity {engine.capacity}",
        "# TYPE pikastream_refused_total counter",
        f"pikastream_refused_total {hub.refused}",
        "# TYPE pikastream_step_seconds summary",
        *(f'pikastream_step_seconds{{quantile="{q}"}} {value:.6f}' for q, value in (("0.5", steps.p50), ("0.95", steps.p95), ("0.99", steps.p99))),
    ]
    rows = [(room.id, room.session.report(), room.watchers) for room in hub.rooms.values()]
    for name, kind, value in (
        ("frames_total", "counter", lambda figures, _: figures["frames"]),
        ("late_frames_total", "counter", lambda figures, _: figures["late_frames"]),
        ("lost_frames_total", "counter", lambda figures, _: figures["lost_frames"]),
        ("real_time_factor", "gauge", lambda figures, _: figures["real_time_factor"]),
        ("waiting_speech_seconds", "gauge", lambda figures, _: figures["waiting_speech_seconds"]),
        ("viewers", "gauge", lambda _, viewers: viewers),
    ):
        lines.append(f"# TYPE pikastream_session_{name} {kind}")
        lines += [f'pikastream_session_{name}{{session="{name_of}"}} {value(figures, viewers)}' for name_of, figures, viewers in rows]
    return "\n".join(lines) + "\n"


async def _openapi(request: web.Request) -> web.Response:
    return web.json_response(json.loads((resources.files("pikastream_jax.live") / "openapi.json").read_text()))


async def _avatars(request: web.Request) -> web.Response:
    return web.json_response([{"name": name, "picture": f"/api/avatars/{name}.png"} for name in avatar_names()])


async def _avatar(request: web.Request) -> web.StreamResponse:
    try:
        path = avatar_path(request.match_info["name"].removesuffix(".png"))
    except ServeError as error:
        raise Refused(404, str(error)) from error
    return web.FileResponse(path, headers={"Cache-Control": "max-age=3600"})


async def _asked(request: web.Request) -> tuple[dict[str, Any], bytes | None]:
    """What a JSON object or a form says, and the picture that came with a form."""
    if request.content_type == "application/json":
        try:
            fields = await request.json()
        except ValueError as error:
            raise Refused(400, f"the body is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise Refused(400, f"the body is a JSON {type(fields).__name__}: send an object")
        return fields, None
    if request.content_type != "multipart/form-data":
        raise Refused(415, f"the body is {request.content_type}: send application/json, or multipart/form-data with an image")
    try:
        form = await request.post()
    except ValueError as error:
        raise Refused(400, f"the form cannot be read: {error}") from error
    image = form.get("image")
    fields = {name: value for name, value in form.items() if name != "image"}
    if image is not None and not isinstance(image, web.FileField):
        raise Refused(422, "image is text: send it as a file")
    for name, value in fields.items():
        if not isinstance(value, str):
            raise Refused(422, f"{name} is a file: send text")
    return fields, image.file.read() if image is not None else None


def _known(fields: dict[str, Any], names: tuple[str, ...]) -> None:
    if unknown := sorted(set(fields) - set(names)):
        raise Refused(422, f"unknown field {', '.join(unknown)}: there are {', '.join(names)}")


def _consent(fields: dict[str, Any]) -> bool:
    return fields.get("consent") in (True, "true")


def _avatar_name(fields: dict[str, Any]) -> str | None:
    avatar = fields.get("avatar")
    if avatar is not None and not isinstance(avatar, str):
        raise Refused(422, f"avatar is {type(avatar).__name__}: send a name")
    return avatar or None


async def _create(request: web.Request) -> web.Response:
    fields, image = await _asked(request)
    _known(fields, ("avatar", "prompt", "seed", "consent"))
    if image is not None and _avatar_name(fields):
        raise Refused(422, "an avatar and an image: send one of them")
    try:
        seed = int(fields.get("seed", 0))
    except (TypeError, ValueError) as error:
        raise Refused(422, f"seed {fields['seed']!r} is no whole number") from error
    room = await request.app[HUB].open(_client(request), _avatar_name(fields), image, _consent(fields), fields.get("prompt", "a person talking"), seed)
    return web.json_response(room.report(), status=201, headers={"Location": f"/api/sessions/{room.id}"})


async def _read(request: web.Request) -> web.Response:
    return web.json_response(_room(request).report())


async def _update(request: web.Request) -> web.Response:
    hub, room = request.app[HUB], _room(request)
    fields, image = await _asked(request)
    _known(fields, ("avatar", "prompt", "consent"))
    avatar, shows = _avatar_name(fields), {}
    if image is None and avatar is None and "prompt" not in fields:
        raise Refused(422, "nothing to change: send prompt, avatar or image")
    if image is not None or avatar is not None:
        shows["face_shows_at"] = await hub.set_reference(room, avatar, image, _consent(fields))
    if "prompt" in fields:
        shows["prompt_shows_at"] = await hub.set_prompt(room, fields["prompt"])
    return web.json_response(room.report() | shows)


async def _delete(request: web.Request) -> web.Response:
    await request.app[HUB].close(_room(request))
    return web.Response(status=204)


async def _interrupt(request: web.Request) -> web.Response:
    cut = await _room(request).session.interrupt()
    return web.json_response({"played_seconds": round(cut.played, 3), "dropped_seconds": round(cut.dropped, 3)})


async def _audio(request: web.Request) -> web.StreamResponse:
    """Speech by WebSocket: 16-bit mono PCM in binary messages; `end` and `interrupt` in text."""
    room = _room(request)
    try:
        rate = int(request.query.get("rate", "16000"))
    except ValueError as error:
        raise Refused(422, f"rate {request.query['rate']!r} is no whole number") from error
    limits = request.app[HUB].limits
    socket = web.WebSocketResponse(max_msg_size=limits.message_bytes, heartbeat=20)
    await socket.prepare(request)
    async for message in socket:
        try:
            if message.type == WSMsgType.BINARY:
                if len(message.data) % 2:
                    raise ValueError(f"{len(message.data)} bytes are no 16-bit samples: send an even number")
                await room.session.push_audio(np.frombuffer(message.data, "<i2").astype(np.float32) / 32768, rate)
            elif message.type == WSMsgType.TEXT and message.data == "end":
                await room.session.end_utterance()
            elif message.type == WSMsgType.TEXT and message.data == "interrupt":
                cut = await room.session.interrupt()
                await socket.send_json({"played_seconds": round(cut.played, 3)})
            elif message.type == WSMsgType.TEXT:
                raise ValueError(f"{message.data[:40]!r} is no command: send end or interrupt")
        except (ValueError, VoiceFull) as error:
            await socket.send_json({"error": str(error)})
            await socket.close(code=WSCloseCode.UNSUPPORTED_DATA, message=str(error).encode()[:120])
            break
    else:
        await room.session.end_utterance()
    return socket


async def _video(request: web.Request) -> web.StreamResponse:
    room = _room(request)
    _seat(request, room)
    return await video_socket(request, room.broadcast)


async def _stream(request: web.Request) -> web.StreamResponse:
    room = _room(request)
    _seat(request, room)
    return await transport_stream(request, room.broadcast)


async def _webrtc(request: web.Request) -> web.Response:
    fields, _ = await _asked(request)
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


async def _connect(request: web.Request, offer: str) -> tuple[str, str]:
    room = _room(request)
    _seat(request, room)
    peer = Peer(room.session, room.broadcast)
    try:
        answer = await peer.answer(offer)
    except ValueError as error:
        raise Refused(422, str(error)) from error
    room.peers.add(peer)
    return peer.name, answer


def _seat(request: web.Request, room: Room) -> None:
    room.peers = {peer for peer in room.peers if not peer.closed.is_set()}
    limit = request.app[HUB].limits.viewers
    if max(room.watchers, len(room.peers)) >= limit:
        raise Refused(429, f"{limit} viewers of one session are the most", 5)


def _room(request: web.Request) -> Room:
    return request.app[HUB].find(request.match_info["id"])


def _client(request: web.Request) -> str:
    return request.remote or "unknown"
