"""The one address of many replicas: places sessions, passes their requests on, and begins those anew whose replica has died.

Signalling, sound and media over TCP pass through here; WebRTC's packets do not, they go between the replica and its viewers.
It keeps of every session what it would have to begin with elsewhere (face, prompt, seed, clock), in memory and as long as the session lives.
"""

import asyncio
import dataclasses
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from aiohttp import (
    ClientError,
    ClientSession,
    ClientTimeout,
    TCPConnector,
    WSCloseCode,
    WSMsgType,
    WSServerHandshakeError,
    web,
)
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from yarl import URL

from pikastream_jax.live.access import Access, is_loopback
from pikastream_jax.live.forms import wanted_session
from pikastream_jax.live.hub import Limits, Refused, Wanted
from pikastream_jax.live.pages import errors, page_routes
from pikastream_jax.live.replica import Goes, NotOpened, Opened, Taken

_log = logging.getLogger(__name__)

FULL = 1.0  # seconds in which a free slot must be found, else the session is refused
MOVING = 30.0  # seconds in which a session must begin anew, else it is lost
MOVES = 10  # of one session: one that kills whatever replica it is on is let go
AGAIN = 1.0  # seconds in which a replica that took a session and could not have it is asked once more
PATIENCE = 5.0  # seconds that a request waits for a session that is moving
_OWN = {"host", "connection", "upgrade", "authorization", "origin", "content-length", "transfer-encoding", "x-forwarded-for", "content-encoding", "date", "server"}
_GATEWAY: web.AppKey["Gateway"] = web.AppKey("gateway", object)


@dataclasses.dataclass
class Place:
    """Where a session is."""

    wanted: Wanted
    opened: asyncio.Future
    task: asyncio.Task | None = None
    address: str | None = None  # of the replica's server; None while it moves
    moves: int = 0


class Gateway:
    """All sessions of all replicas.

    Args:
      handle: of the deployment of `Replica`, streaming.
      secret: what its servers want to see.
      replicas: how many run at the moment.
    """

    def __init__(self, handle: Any, secret: str, limits: Limits, slots: int, replicas: Callable[[], int]):
        self._handle, self._secret, self._limits, self._slots, self._replicas = handle, secret, limits, slots, replicas
        self.places: dict[str, Place] = {}
        self.refused = self.moves = 0
        self._http = ClientSession(timeout=ClientTimeout(total=None, sock_connect=5), auto_decompress=False, connector=TCPConnector(limit=0))
        self._counted: tuple[float, int] = (-1e9, 0)

    async def open(self, wanted: Wanted) -> dict[str, Any]:
        """The report of a new session. Raises Refused."""
        if sum(place.wanted.client == wanted.client for place in self.places.values()) >= self._limits.sessions_per_client:
            raise Refused(429, f"{self._limits.sessions_per_client} sessions of one client are the most: end one first", 10)
        place = Place(dataclasses.replace(wanted, name=secrets.token_urlsafe(12)), asyncio.get_running_loop().create_future())
        self.places[place.wanted.name] = place
        place.task = asyncio.create_task(self._keep(place))
        return await asyncio.shield(place.opened)

    async def where(self, name: str) -> str:
        """The address of the server that has a session. Raises Refused."""
        end = time.monotonic() + PATIENCE
        while (place := self.places.get(name)) is not None and place.address is None and time.monotonic() < end:
            await asyncio.sleep(0.05)
        if place is None:
            raise Refused(404, f"there is no session {name!r}: it has ended, or never was")
        if place.address is None:
            raise Refused(503, f"session {name} is moving to another machine", 1)
        return place.address

    async def state(self) -> dict[str, Any]:
        """How it is doing."""
        if time.monotonic() - self._counted[0] > 1.0:  # asked by everybody, it must not be asked of Ray every time
            self._counted = time.monotonic(), self._counted[1]
            try:
                count = await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(None, self._replicas), 5.0)
            except (RayError, RayServeException, TimeoutError) as error:
                _log.warning("Ray does not answer: %s", error)
                count = 0
            self._counted = time.monotonic(), count
        replicas = self._counted[1]
        sessions = len(self.places)
        return {"status": "ok" if replicas else "no replica runs", "replicas": replicas, "sessions": sessions, "capacity": replicas * self._slots, "moves": self.moves, "refused": self.refused}

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Passes a request of a session on to where that is."""
        address = await self.where(request.match_info["id"])
        client = request.remote or "unknown"
        segments = request.path.split("/")
        if "." in segments or ".." in segments:  # decoded: whatever they were written as, they would lead out of the session
            raise Refused(404, f"there is no {request.path!r}")
        if segments[4:5] == ["rtp"] and is_loopback(client) and not is_loopback(URL(address).host or ""):
            raise Refused(422, "RTP goes to the address that asks, and 127.0.0.1 is another machine where the session is: ask from the machine that is to receive it")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _OWN and not name.lower().startswith("sec-websocket")}
        headers |= {"Authorization": f"Bearer {self._secret}", "X-Forwarded-For": client}
        target = URL(address + str(request.rel_url.without_query_params("token")), encoded=True)
        response: web.StreamResponse | None = None
        try:
            if request.headers.get("Upgrade", "").lower() == "websocket":
                return await self._forward_socket(request, target, headers)
            async with self._http.request(request.method, target, headers=headers, data=await request.read(), allow_redirects=False) as answer:
                if answer.status == 404 and len(segments) == 4 and request.match_info["id"] in self.places:
                    raise Refused(503, f"session {request.match_info['id']} is moving to another machine", 1)
                passed = {name: value for name, value in answer.headers.items() if name.lower() not in _OWN - {"content-length"}}
                response = web.StreamResponse(status=answer.status, headers=passed)
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response
        except WSServerHandshakeError as error:
            raise Refused(error.status, "the WebSocket is refused: there are too many viewers, or the address asks for what there is not") from error
        except (ClientError, TimeoutError) as error:
            _log.warning("%s: %s", request.path, error)
            if response is not None and response.prepared:  # nothing else can be said in mid-answer
                if request.transport is not None:
                    request.transport.abort()
                return response
            raise Refused(503, f"session {request.match_info['id']} cannot be reached", 1) from error

    async def shut(self) -> None:
        """Ends all sessions."""
        tasks = [place.task for place in self.places.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.close()

    async def _forward_socket(self, request: web.Request, target: URL, headers: dict[str, str]) -> web.WebSocketResponse:
        async with self._http.ws_connect(target, headers=headers, max_msg_size=2**24) as there:
            here = web.WebSocketResponse(heartbeat=20, max_msg_size=self._limits.message_bytes)
            await here.prepare(request)

            async def upwards() -> None:
                async for message in here:
                    await (there.send_bytes if message.type is WSMsgType.BINARY else there.send_str)(message.data)

            upward = asyncio.create_task(upwards())
            downward = asyncio.create_task(_pump(there, here))
            await asyncio.wait((upward, downward), return_when=asyncio.FIRST_COMPLETED)
            for task in (upward, downward):
                task.cancel()
            # 1012, service restart, where the replica went away without a word: try again.
            code = there.close_code if there.close_code not in (None, WSCloseCode.ABNORMAL_CLOSURE) else WSCloseCode.SERVICE_RESTART
            await here.close(code=code)
            return here

    async def _keep(self, place: Place) -> None:
        """A session, wherever it is, until it ends."""
        began, lost = time.monotonic(), None
        try:
            while True:
                try:
                    await self._stay(place)
                    return
                except Refused as refused:
                    if not place.opened.done():
                        # A replica that frees its slot at this moment, or is slow at this moment, is not the only one.
                        if refused.status == 503 and time.monotonic() < began + AGAIN:
                            await asyncio.sleep(0.3)
                            continue
                        self.refused += refused.status == 503
                        place.opened.set_exception(refused)
                        return
                    if time.monotonic() > lost + MOVING:
                        _log.warning("session %s is lost: %s", place.wanted.name, refused)
                        return
                    await asyncio.sleep(0.2)
                except (RayError, RayServeException) as error:
                    _log.warning("session %s has lost its replica: %s", place.wanted.name, type(error).__name__)
                    if place.address is not None or lost is None:
                        lost = time.monotonic()
                    if isinstance(error, RayTaskError) and not place.opened.done():
                        return  # what it was asked for made it fail, and would make the next one
                    place.address = None
                    if time.monotonic() > lost + MOVING or place.moves >= MOVES:
                        return
                    place.moves += 1
                    self.moves += 1
                    await asyncio.sleep(0.1)
        finally:
            self.places.pop(place.wanted.name, None)
            if not place.opened.done():
                place.opened.set_exception(Refused(503, "no replica could begin the session", 5))

    async def _stay(self, place: Place) -> None:
        """A session on one replica. Returns when it ends there in its own right.

        Raises:
          Refused: no replica has a slot, or the one that had will not have it.
          RayError: the replica is gone.
        """
        said = self._handle.hold.remote(place.wanted)
        try:
            try:
                taken: Taken = await asyncio.wait_for(anext(said), FULL)
            except (TimeoutError, BackPressureError) as error:
                raise Refused(503, f"{len(self.places) - 1} sessions are served and all slots are taken: try again later", 30) from error
            async for what in said:
                match what:
                    case NotOpened(status, reason, retry_after):
                        raise Refused(status, reason, retry_after)
                    case Opened(report):
                        place.address = taken.address
                        if not place.opened.done():
                            place.opened.set_result(report)
                    case Goes(media_time, wanted):
                        place.wanted = dataclasses.replace(wanted or place.wanted, media_time=media_time)
        finally:
            said.cancel()


async def _pump(there, here) -> None:
    async for message in there:
        await (here.send_bytes if message.type is WSMsgType.BINARY else here.send_str)(message.data)


def gateway_application(handle: Any, secret: str, access: Access, limits: Limits, slots: int, replicas: Callable[[], int]) -> web.Application:
    """The service of all replicas; its routes are those of one (`server.application`)."""
    app = web.Application(client_max_size=limits.image_bytes + 2**16, middlewares=[errors, access.middleware])

    async def begin(app: web.Application):
        app[_GATEWAY] = Gateway(handle, secret, limits, slots, replicas)

    async def end(app: web.Application):
        await app[_GATEWAY].shut()

    app.on_startup.append(begin)
    app.on_shutdown.append(end)  # and not on_cleanup: before that, the requests of viewers are waited for
    app.add_routes(
        [
            *page_routes(),
            web.get("/health", _health),
            web.get("/ready", _ready),
            web.get("/metrics", _metrics),
            web.post("/api/sessions", _create),
            web.route("*", "/api/sessions/{id}", _forward),
            web.route("*", "/api/sessions/{id}/{rest:.*}", _forward),
        ]
    )
    return app


async def _create(request: web.Request) -> web.Response:
    report = await request.app[_GATEWAY].open(await wanted_session(request, request.remote or "unknown"))
    return web.json_response(report, status=201, headers={"Location": f"/api/sessions/{report['id']}"})


async def _forward(request: web.Request) -> web.StreamResponse:
    return await request.app[_GATEWAY].forward(request)


async def _health(request: web.Request) -> web.Response:
    state = await request.app[_GATEWAY].state()
    return web.json_response(state, status=200 if state["replicas"] else 500)


async def _ready(request: web.Request) -> web.Response:
    state = await request.app[_GATEWAY].state()
    free = max(0, state["capacity"] - state["sessions"])
    return web.json_response({"ready": free > 0, "free": free}, status=200 if free else 503)


async def _metrics(request: web.Request) -> web.Response:
    state = await request.app[_GATEWAY].state()
    kinds = {"replicas": "gauge", "sessions": "gauge", "capacity": "gauge", "moves": "counter", "refused": "counter"}
    lines = []
    for name, kind in kinds.items():
        full = f"pikastream_{name}" + ("_total" if kind == "counter" else "")
        lines += [f"# TYPE {full} {kind}", f"{full} {state[name]}"]
    return web.Response(text="\n".join(lines) + "\n", content_type="text/plain", charset="utf-8")
