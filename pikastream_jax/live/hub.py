"""The sessions of a server: opened within limits, encoded once, watched by many, forgotten when nobody is left."""

import asyncio
import contextlib
import dataclasses
import io
import secrets
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from pikastream_jax.live.engine import Engine, EngineFull
from pikastream_jax.live.marks import Labeller, draw_number
from pikastream_jax.live.media import Broadcast, FrameEncoder
from pikastream_jax.live.record import record
from pikastream_jax.live.rtp import RtpViewer
from pikastream_jax.live.session import Frame, LiveSession
from pikastream_jax.live.webrtc import Peer
from pikastream_jax.serving.errors import ServeError
from pikastream_jax.serving.image import avatar_names, avatar_path, load_image, reference_pixels

HUB: web.AppKey["Hub"] = web.AppKey("hub", object)
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
PROMPT_LENGTH = 500  # characters


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a stranger may ask for."""

    sessions_per_client: int = 4
    image_bytes: int = 8 * 2**20
    message_bytes: int = 2**20
    """Of one WebSocket message; 10 s of 48 kHz in 16 bits."""
    idle_seconds: float = 60.0
    """After which a session that nobody watches ends."""
    age_seconds: float = 4 * 3600.0
    """After which any session ends."""
    viewers: int = 8
    """Of one session."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a session begins with; enough to begin it anew elsewhere."""

    client: str
    avatar: str | None
    """A face of the gallery; None: the first, where there is no image."""
    image: bytes | None
    """An uploaded picture, as it came."""
    consent: bool
    """Whether the person shown agrees."""
    prompt: str
    seed: int
    name: str | None = None
    """What the session is called; None makes up a name that cannot be guessed."""
    media_time: float = 0.0
    """Seconds at which its clock goes on."""


class Refused(Exception):
    """What was asked for will not be done: an HTTP status and one line that says why and what to do."""

    def __init__(self, status: int, reason: str, retry_after: int | None = None):
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after


@dataclasses.dataclass
class Utterance:
    """When speech was shown, to measure latency."""

    first: int  # number of its first frame
    last: int | None = None
    ms: dict[str, float] | None = None  # from its first sound to the leaving of its first frame


def _stages(frame: Frame) -> dict[str, float] | None:
    """Where the time went between the first sound of an utterance and its first frame, in ms."""
    if (onset := frame.onset) is None:
        return None
    moments = {"wait_for_chunk": onset.begun - onset.pushed, "model": onset.made - onset.begun, "reserve": frame.at - onset.made}
    return {name: round(1e3 * seconds, 1) for name, seconds in moments.items()}


class Room:
    """A session with its one encode, its viewers and what is known of it."""

    def __init__(self, session: LiveSession, wanted: Wanted, label: bool, numbers: bool):
        model = session.model
        labeller = Labeller(model.height, model.width) if label else None

        def mark(frame: Frame):
            picture = labeller(frame.picture) if labeller else frame.picture
            return draw_number(picture, frame.number) if numbers else picture

        self.permanent = False  # whether it lives as long as the server
        self.closing: asyncio.Future | None = None
        self.id, self.session = wanted.name or secrets.token_urlsafe(12), session
        self._wanted = wanted
        self.opened = self.watched = time.monotonic()
        self.broadcast = Broadcast(session, FrameEncoder(model.height, model.width, model.fps, mark), self._seen)
        self.peers: set[Peer] = set()
        self.receivers: set[RtpViewer] = set()
        self._recording: asyncio.Task | None = None
        self.utterances: list[Utterance] = []  # the last few
        self._speaks = False
        self._clock = wanted.media_time

    @property
    def wanted(self) -> Wanted:
        """What it would have to begin with elsewhere to go on as it is now."""
        return dataclasses.replace(self._wanted, name=self.id, media_time=self._clock)

    def changed(self, **fields) -> None:
        """Fields of `wanted` that are others now."""
        self._wanted = dataclasses.replace(self._wanted, **fields)

    def _seen(self, frame: Frame) -> None:
        self._clock = frame.media_time + 1 / self.session.model.fps
        if frame.spoken and not self._speaks:
            self.utterances = [*self.utterances[-9:], Utterance(frame.number, ms=_stages(frame))]
        if self._speaks and not frame.spoken or frame.ends and self.utterances:
            self.utterances[-1].last = frame.number
        self._speaks = frame.spoken > 0 and not frame.ends

    def report(self) -> dict[str, Any]:
        """What a client may know."""
        return {
            "id": self.id,
            "avatar": self._wanted.avatar,
            "prompt": self._wanted.prompt,
            "seed": self._wanted.seed,
            "media_seconds": round(self._clock, 3),
            "viewers": self.watchers,
            "speaking": self._speaks,
            "age_seconds": round(time.monotonic() - self.opened, 1),
            "utterances": [dataclasses.asdict(utterance) for utterance in self.utterances],
            "figures": self.session.report() | {"encode_ms": round(1e3 * self.broadcast.encode_seconds, 2)},
        }

    def record(self, folder: Path) -> None:
        """Keeps the session as a file of the folder, named by its time and the beginning of its name."""
        path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{self.id[:6]}.mp4"
        began = self._wanted
        about = {"avatar": began.avatar, "prompt": began.prompt, "seed": began.seed, "uploaded_with_consent": began.avatar is None}
        self._recording = asyncio.create_task(record(self.broadcast, path, about))

    @property
    def watchers(self) -> int:
        """Viewers, a recording not among them."""
        return self.broadcast.viewers - (self._recording is not None and not self._recording.done())

    def forget_those_who_left(self) -> None:
        self.peers = {peer for peer in self.peers if not peer.closed.is_set()}
        self.receivers = {receiver for receiver in self.receivers if not receiver.over}

    async def close(self) -> None:
        await self.session.close()
        await asyncio.gather(*(viewer.close() for viewer in (*self.peers, *self.receivers)), return_exceptions=True)
        await self.broadcast.ended.wait()
        if self._recording is not None:
            await self._recording
        await self.broadcast.close()


class Hub:
    """All rooms.

    Args:
      label: whether pictures say that they are generated.
      numbers: whether they carry their number, to measure latency.
      recordings: folder in which every session is kept; None keeps nothing.
      behind_gateway: whether all requests come from a gateway, which says in X-Forwarded-For for whom.
    """

    def __init__(self, engine: Engine, limits: Limits, *, label: bool = True, numbers: bool = False, recordings: Path | None = None, behind_gateway: bool = False):
        self.engine, self.limits, self._behind_gateway = engine, limits, behind_gateway
        self._label, self._numbers, self._recordings = label, numbers, recordings
        self.rooms: dict[str, Room] = {}
        self._opening: list[str] = []  # clients whose sessions are being made
        self.refused = 0
        self._sweeper = asyncio.create_task(self._sweep())

    async def open(self, wanted: Wanted) -> Room:
        """A new room.

        Raises:
          Refused: the face, the prompt or the seed will not do, or there is no room.
        """
        _check_prompt(wanted.prompt)
        if not 0 <= wanted.seed < 2**32:
            raise Refused(422, f"seed {wanted.seed} is out of range: use 0 to {2**32 - 1}")
        if (former := self.rooms.get(wanted.name)) is not None:  # begun anew where it still is: its place is the one it gets
            await self.close(former)
        if sum(room.wanted.client == wanted.client for room in self.rooms.values()) + self._opening.count(wanted.client) >= self.limits.sessions_per_client:
            raise Refused(429, f"{self.limits.sessions_per_client} sessions of one client are the most: end one first", 10)
        self._opening.append(wanted.client)
        try:
            pixels = await self.pixels(wanted.avatar, wanted.image, wanted.consent)
            first = round(wanted.media_time * self.engine.model.fps)
            session = await self._session(pixels, wanted.prompt, wanted.seed, first)
        except EngineFull as error:
            self.refused += 1
            raise Refused(503, str(error), error.retry_after) from error
        except RuntimeError as error:
            raise Refused(503, str(error)) from error
        finally:
            self._opening.remove(wanted.client)
        if wanted.image is None and wanted.avatar is None:
            wanted = dataclasses.replace(wanted, avatar=avatar_names()[0])
        room = Room(session, wanted, self._label, self._numbers)
        self.rooms[room.id] = room
        if self._recordings is not None:
            room.record(self._recordings)
        return room

    def client(self, request: web.Request) -> str:
        """The address of whoever asks."""
        return (request.headers.get("X-Forwarded-For") if self._behind_gateway else None) or request.remote or "unknown"

    def find(self, name: str) -> Room:
        """Raises Refused where there is no such room."""
        if name not in self.rooms:
            raise Refused(404, f"there is no session {name!r}: it has ended, or never was")
        return self.rooms[name]

    async def set_prompt(self, room: Room, prompt: str) -> float:
        """Returns the media time from which on it shows."""
        _check_prompt(prompt)
        at = await room.session.set_prompt(prompt)
        room.changed(prompt=prompt)
        return at

    async def set_reference(self, room: Room, avatar: str | None, image: bytes | None, consent: bool) -> float:
        """Returns the media time from which on the new face shows."""
        at = await room.session.set_reference(await self.pixels(avatar, image, consent))
        room.changed(avatar=avatar, image=image, consent=consent)
        return at

    async def close(self, room: Room) -> None:
        """Ends a room, once, and returns when it has ended."""
        room.closing = room.closing or asyncio.ensure_future(room.close())
        try:
            await asyncio.shield(room.closing)
        finally:
            if self.rooms.get(room.id) is room:
                del self.rooms[room.id]

    async def _session(self, *arguments) -> LiveSession:
        """`Engine.open` in a thread. Whoever is gone when it is done leaves no session behind."""
        opening = asyncio.get_running_loop().run_in_executor(None, self.engine.open, *arguments)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(lambda done: done.exception() or self.engine.remove(done.result()))
            raise

    async def shut(self) -> None:
        """Ends everything."""
        self._sweeper.cancel()
        for room in tuple(self.rooms.values()):
            await self.close(room)

    async def pixels(self, avatar: str | None, image: bytes | None, consent: bool):
        """The face, as the model takes it. Decoded in a thread.

        Raises:
          Refused: no avatar of that name, an upload without consent, or one that is no fit picture.
        """
        if image is not None:
            if not consent:
                raise Refused(403, "a likeness needs the permission of the person shown: send consent=true if you have it")
            if len(image) > self.limits.image_bytes:
                raise Refused(413, f"the image has {len(image)} bytes, the limit is {self.limits.image_bytes}: shrink it")

        def decode():
            picture = load_image(avatar_path(avatar)) if image is None else load_image(io.BytesIO(image), IMAGE_FORMATS)
            return reference_pixels(picture, self.engine.model.height, self.engine.model.width)

        try:
            return await asyncio.get_running_loop().run_in_executor(None, decode)
        except ServeError as error:
            raise Refused(422, str(error)) from error

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for room in tuple(self.rooms.values()):
                if room.watchers:
                    room.watched = now
                forgotten = now - room.watched > self.limits.idle_seconds or now - room.opened > self.limits.age_seconds
                if forgotten and not room.permanent or room.broadcast.ended.is_set():
                    with contextlib.suppress(Exception):  # one room's end is no other's
                        await self.close(room)


def _check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise Refused(422, f"the prompt is {type(prompt).__name__}: send text")
    if len(prompt) > PROMPT_LENGTH:
        raise Refused(422, f"the prompt has {len(prompt)} characters, the limit is {PROMPT_LENGTH}: shorten it")
