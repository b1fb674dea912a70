"""One engine as a replica of Ray Serve: a process that owns one accelerator, with a server of its own.

A session is one request that lasts as long as the session. So everything that Ray Serve does with requests, it does with sessions: it places them where the
fewest are, never more than there are slots, adds replicas when slots fill and takes some away when they do not, waits for sessions before it stops
a replica, and says at once when a replica has died with its sessions. Media and everything else goes to the replica's own server, past Ray.
"""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from pikastream_jax.live.access import Access
from pikastream_jax.live.engine import Engine
from pikastream_jax.live.hub import HUB, Hub, Limits, Refused, Wanted
from pikastream_jax.live.model import LiveModel
from pikastream_jax.live.server import application

SNAPSHOT = 0.2  # seconds between two looks at what a session would have to begin with elsewhere


@dataclasses.dataclass(frozen=True)
class Taken:
    """A replica has a slot for the session."""

    address: str  # of its server


@dataclasses.dataclass(frozen=True)
class Opened:
    """The session is there."""

    report: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class NotOpened:
    """The session is refused."""

    status: int
    reason: str
    retry_after: int | None


@dataclasses.dataclass(frozen=True)
class Goes:
    """How far the session is, and what it would begin with elsewhere, where that has changed."""

    media_time: float
    wanted: Wanted | None


@dataclasses.dataclass(frozen=True)
class ReplicaOptions:
    """What every replica is told.

    Attributes:
      build: makes the model.
      slots: sessions of a replica.
      host: address that its server listens at, which clients of media must reach; None: the machine's own, as Ray knows it.
      secret: what the gateway shows to its server.
      label, numbers, recordings: see `Hub`.
    """

    build: Callable[[], LiveModel]
    slots: int
    secret: str
    host: str | None = None
    label: bool = True
    numbers: bool = False
    recordings: Path | None = None


class Replica:
    """An engine and its server.

    Raises:
      RuntimeError: this machine does not hold as many sessions as it has slots.
    """

    def __init__(self, options: ReplicaOptions):
        import ray

        self._engine = Engine(options.build(), options.slots)
        if self._engine.capacity < options.slots:
            steps = self._engine.steps
            raise RuntimeError(
                f"this machine holds {self._engine.capacity} sessions in real time (a step takes {1e3 * steps.p95:.0f} ms of "
                f"{1e3 * self._engine.chunk_seconds:.0f}), and --sessions asks for {options.slots} of each replica"
            )
        host = options.host or ray.util.get_node_ip_address()
        # A loop of its own: what else happens in Ray's must not make a frame late.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="server", daemon=True).start()
        self._hub, self._runner, port = asyncio.run_coroutine_threadsafe(self._serve(host, options), self._loop).result()
        self._address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def hold(self, wanted: Wanted) -> AsyncIterator[Taken | Opened | NotOpened | Goes]:
        """A session, for as long as it lasts; cancelled, it ends the session.

        Raises:
          RuntimeError: the engine has failed.
        """
        yield Taken(self._address)
        try:
            room = await self._there(self._hub.open(wanted))
        except Refused as refused:
            yield NotOpened(refused.status, str(refused), refused.retry_after)
            return
        try:
            yield Opened(room.report())
            known = room.wanted
            while self._hub.rooms.get(room.id) is room:
                await asyncio.sleep(SNAPSHOT)
                now = room.wanted
                changed = dataclasses.replace(now, media_time=known.media_time) != known
                yield Goes(now.media_time, now if changed else None)
                known = now
            if self._engine.failure is not None:
                raise RuntimeError(f"the engine has failed: {self._engine.failure}")
        finally:
            asyncio.run_coroutine_threadsafe(self._hub.close(room), self._loop)

    def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that raises."""
        if self._engine.failure is not None:
            raise RuntimeError(f"the engine has failed: {self._engine.failure}")

    def __del__(self) -> None:
        """Called by Ray Serve when the replica is stopped."""
        try:
            if hasattr(self, "_runner"):
                asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        finally:
            if hasattr(self, "_engine"):
                self._engine.close()

    async def _serve(self, host: str, options: ReplicaOptions) -> tuple[Hub, web.AppRunner, int]:
        limits = Limits(sessions_per_client=options.slots)  # of a client's sessions the gateway keeps count
        app = application(
            self._engine,
            Access(host, options.secret),
            limits,
            label=options.label,
            numbers=options.numbers,
            recordings=options.recordings,
            behind_gateway=True,
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, host, 0).start()
        return app[HUB], runner, runner.addresses[0][1]

    async def _there(self, coroutine) -> Any:
        """Runs something in the server's loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))
