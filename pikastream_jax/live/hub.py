"""The sessions of a server: opened within limits, encoded once, watched by many, forgotten when nobody is left."""

import asyncio
import contextlib
import dataclasses
import io
import secrets
import time
from pathlib import Path
from typing import Any

from pikastream_jax.live.engine import Engine, EngineFull
from pikastream_jax.live.marks import Labeller, draw_number
from pikastream_jax.live.media import Broadcast, FrameEncoder
from pikastream_jax.live.record import record
from pikastream_jax.live.session import Frame, LiveSession
from pikastream_jax.serving.errors import ServeError
from pikastream_jax.serving.image import avatar_names, avatar_path, load_image, reference_pixels

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


class Refused(Exception):
    """What was asked for will not be done: an HTTP status and one line that says why and what to do."""

    def __init__(self, status: int, reason: str, retry_after: int | None = None):
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after


@dataclasses.dataclass
class Utterance:
    """When speech was shown, to measure latency: numbers of frames."""

    first: int
    last: int | None = None


class Room:
    """A session with its one encode, its viewers and what is known of it."""

    def __init__(self, session: LiveSession, client: str, avatar: str | None, prompt: str, seed: int, label: bool, numbers: bool):
        model = session.model
        labeller = Labeller(model.height, model.width) if label else None

        def mark(frame: Frame):
            picture = labeller(frame.picture) if labeller else frame.picture
            return draw_number(picture, frame.number) if numbers else picture

        self.id, self.session, self.client = secrets.token_urlsafe(12), session, client
        self.avatar, self.prompt, self.seed = avatar, prompt, seed
        self.opened = self.watched = time.monotonic()
        self.broadcast = Broadcast(session, FrameEncoder(model.height, model.width, model.fps, mark), self._seen)
        self.peers: set[Any] = set()
        self._recording: asyncio.Task | None = None
        self.utterances: list[Utterance] = []  # the last few
        self._speaks = False

    def _seen(self, frame: Frame) -> None:
        if frame.spoken and not self._speaks:
            self.utterances = [*self.utterances[-9:], Utterance(frame.number)]
        if (frame.ends or not frame.spoken) and self._speaks or frame.ends:
            self.utterances[-1].last = frame.number
        self._speaks = frame.spoken > 0 and not frame.ends

    def report(self) -> dict[str, Any]:
        """What a client may know."""
        return {
            "id": self.id,
            "avatar": self.avatar,
            "prompt": self.prompt,
            "seed": self.seed,
            "viewers": self.watchers,
            "speaking": self._speaks,
            "age_seconds": round(time.monotonic() - self.opened, 1),
            "utterances": [dataclasses.asdict(utterance) for utterance in self.utterances],
            "figures": self.session.report(),
        }

    def record(self, folder: Path) -> None:
        """Keeps the session as a file of the folder, named by its time and the beginning of its name."""
        path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{self.id[:6]}.mp4"
        about = {"avatar": self.avatar, "prompt": self.prompt, "seed": self.seed, "uploaded_with_consent": self.avatar is None}
        self._recording = asyncio.create_task(record(self.broadcast, path, about))

    @property
    def watchers(self) -> int:
        """Viewers, a recording not among them."""
        return self.broadcast.viewers - (self._recording is not None and not self._recording.done())

    async def close(self) -> None:
        for peer in tuple(self.peers):
            await peer.close()
        await self.session.close()
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
    """

    def __init__(self, engine: Engine, limits: Limits, *, label: bool = True, numbers: bool = False, recordings: Path | None = None):
        self.engine, self.limits = engine, limits
        self._label, self._numbers, self._recordings = label, numbers, recordings
        self.rooms: dict[str, Room] = {}
        self._opening: list[str] = []  # clients whose sessions are being made
        self.refused = 0
        self._sweeper = asyncio.create_task(self._sweep())

    async def open(self, client: str, avatar: str | None, image: bytes | None, consent: bool, prompt: str, seed: int) -> Room:
        """A new room.

        Raises:
          Refused: the face, the prompt or the seed will not do, or there is no room.
        """
        _check_prompt(prompt)
        if not 0 <= seed < 2**32:
            raise Refused(422, f"seed {seed} is out of range: use 0 to {2**32 - 1}")
        if sum(room.client == client for room in self.rooms.values()) + self._opening.count(client) >= self.limits.sessions_per_client:
            raise Refused(429, f"{self.limits.sessions_per_client} sessions of one client are the most: end one first", 10)
        self._opening.append(client)
        try:
            pixels = await self.pixels(avatar, image, consent)
            session = await asyncio.get_running_loop().run_in_executor(None, self.engine.open, pixels, prompt, seed)
        except EngineFull as error:
            self.refused += 1
            raise Refused(503, str(error), error.retry_after) from error
        except RuntimeError as error:
            raise Refused(503, str(error)) from error
        finally:
            self._opening.remove(client)
        name = None if image is not None else avatar or avatar_names()[0]
        room = Room(session, client, name, prompt, seed, self._label, self._numbers)
        self.rooms[room.id] = room
        if self._recordings is not None:
            room.record(self._recordings)
        return room

    def find(self, name: str) -> Room:
        """Raises Refused where there is no such room."""
        if name not in self.rooms:
            raise Refused(404, f"there is no session {name!r}: it has ended, or never was")
        return self.rooms[name]

    async def set_prompt(self, room: Room, prompt: str) -> float:
        """Returns the media time from which on it shows."""
        _check_prompt(prompt)
        at = await room.session.set_prompt(prompt)
        room.prompt = prompt
        return at

    async def set_reference(self, room: Room, avatar: str | None, image: bytes | None, consent: bool) -> float:
        """Returns the media time from which on the new face shows."""
        at = await room.session.set_reference(await self.pixels(avatar, image, consent))
        room.avatar = None if image is not None else avatar
        return at

    async def close(self, room: Room) -> None:
        self.rooms.pop(room.id, None)
        await room.close()

    async def shut(self) -> None:
        """Ends everything."""
        self._sweeper.cancel()
        for room in tuple(self.rooms.values()):
            await self.close(room)

    async def pixels(self, avatar: str | None, image: bytes | None, consent: bool):
        """The face, as the model takes it. Decoded in a thread, and nothing of an upload is kept.

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
                if forgotten or room.broadcast.ended.is_set():
                    with contextlib.suppress(Exception):  # one room's end is no other's
                        await self.close(room)


def _check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise Refused(422, f"the prompt is {type(prompt).__name__}: send text")
    if len(prompt) > PROMPT_LENGTH:
        raise Refused(422, f"the prompt has {len(prompt)} characters, the limit is {PROMPT_LENGTH}: shorten it")
