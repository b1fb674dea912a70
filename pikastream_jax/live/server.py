"""The service over HTTP: sessions, what is said and changed, and how it is doing.

aiohttp rather than a framework with an ASGI server: one dependency, and WebSockets and aiortc live in the same event loop. The routes are described in `openapi.json`
beside this file, which a test holds against what is registered here.
"""

from pathlib import Path

import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web

from pikastream_jax.live.access import Access
from pikastream_jax.live.engine import Engine
from pikastream_jax.live.forms import asked, avatar_name, consent, known, wanted_session, whole_number
from pikastream_jax.live.hub import HUB, Hub, Limits, Refused, Room
from pikastream_jax.live.pages import errors, page_routes
from pikastream_jax.live.viewers import viewer_routes
from pikastream_jax.live.voice import VoiceFull


def application(
    engine: Engine, access: Access, limits: Limits, *, label: bool = True, numbers: bool = False, recordings: Path | None = None, behind_gateway: bool = False
) -> web.Application:
    """The service of an engine; the engine is not its to close.

    Args:
      label, numbers, recordings, behind_gateway: see `Hub`.
    """
    app = web.Application(client_max_size=limits.image_bytes + 2**16, middlewares=[errors, access.middleware])

    async def begin(app: web.Application):
        app[HUB] = Hub(engine, limits, label=label, numbers=numbers, recordings=recordings, behind_gateway=behind_gateway)

    async def end(app: web.Application):
        await app[HUB].shut()

    app.on_startup.append(begin)
    app.on_shutdown.append(end)  # and not on_cleanup: before that, the requests of viewers are waited for
    app.add_routes(
        [
            *page_routes(),
            web.get("/health", _health),
            web.get("/ready", _ready),
            web.get("/metrics", _metrics),
            web.post("/api/sessions", _create),
            web.get("/api/sessions/{id}", _read),
            web.patch("/api/sessions/{id}", _update),
            web.delete("/api/sessions/{id}", _delete),
            web.post("/api/sessions/{id}/interrupt", _interrupt),
            web.get("/api/sessions/{id}/audio", _audio),
            *viewer_routes(),
        ]
    )
    return app


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


async def _create(request: web.Request) -> web.Response:
    hub = request.app[HUB]
    room = await hub.open(await wanted_session(request, hub.client(request)))
    return web.json_response(room.report(), status=201, headers={"Location": f"/api/sessions/{room.id}"})


async def _read(request: web.Request) -> web.Response:
    return web.json_response(_room(request).report())


async def _update(request: web.Request) -> web.Response:
    hub, room = request.app[HUB], _room(request)
    fields, image = await asked(request)
    known(fields, ("avatar", "prompt", "consent"))
    avatar, shows = avatar_name(fields), {}
    if image is None and avatar is None and "prompt" not in fields:
        raise Refused(422, "nothing to change: send prompt, avatar or image")
    if image is not None or avatar is not None:
        shows["face_shows_at"] = await hub.set_reference(room, avatar, image, consent(fields))
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
    rate = whole_number(request.query.get("rate", "16000"), "rate")
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


def _room(request: web.Request) -> Room:
    return request.app[HUB].find(request.match_info["id"])
