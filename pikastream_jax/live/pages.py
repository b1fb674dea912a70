"""What does not depend on any session: the page, the faces of the gallery, the API's description, and how a refusal is told."""

import json
import logging
from importlib import resources

from aiohttp import web

from pikastream_jax.live.hub import Refused
from pikastream_jax.serving.errors import ServeError
from pikastream_jax.serving.image import avatar_names, avatar_path

_log = logging.getLogger(__name__)
_ASSETS = resources.files("pikastream_jax.live") / "page"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_RULES = "default-src 'self'; connect-src 'self' ws: wss:; media-src 'self' blob:; img-src 'self' blob: data:; frame-ancestors 'none'"


def page_routes() -> list[web.RouteDef]:
    """Routes that need no engine."""
    return [
        web.get("/", _page),
        web.get("/page/{name}", _page),
        web.get("/openapi.json", _openapi),
        web.get("/api/avatars", _avatars),
        web.get("/api/avatars/{name}", _avatar),
    ]


@web.middleware
async def errors(request: web.Request, handler) -> web.StreamResponse:
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
    if name not in ("index.html", "app.js", "sync.js", "style.css"):
        raise Refused(404, f"there is no {name!r}")
    kind = _TYPES[name[name.rindex(".") :]]
    headers = {"Content-Security-Policy": _RULES, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return web.Response(text=(_ASSETS / name).read_text(), content_type=kind, headers=headers)


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
