"""A live session: sound pushed in, frames with their sound out, and prompt, face and speech changed in between.

This is the seam that everything else plugs into: the server's transports, agent frameworks, tests. Its methods belong to one event loop; the
engine's thread hands chunks over.

- Without speech the face listens.
- A word that finds the face listening does not wait for the frames of silence that are made already: every second one of them is left out (at
  the most), and the next chunk is begun and shown by as much earlier. So the face moves at up to twice its speed for a few frames, and nothing jumps.
- A frame leaves at its moment on the media clock, never before. Whoever takes frames more slowly than they come loses the oldest: at
  most `BACKLOG` seconds of them wait.
- Speech waits without limit of speed, up to `voice.LIMIT` seconds; more is refused.
- Interrupted, the speech that waits is dropped and the sound of frames that have not left falls silent at once. Their pictures still leave (there is a chunk of
  them at the most), because a face that freezes or jumps would be worse than lips that stop a moment after the voice.
"""

import asyncio
import dataclasses
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, UInt8

from pikastream_jax.live.model import Change, State
from pikastream_jax.live.voice import SOUND_RATE, Said, Voice

if TYPE_CHECKING:
    from pikastream_jax.live.engine import Engine

BACKLOG = 1.0  # seconds
TOLERATED = 0.1  # seconds that a chunk may come late and the clock stay: to a player it is jitter, where a clock that moves pulls sound and picture apart
AHEAD = 0.06  # seconds of sound, more than a chunk, that must be there of speech that comes as it is spoken: what is hurried must not run dry
FADE = SOUND_RATE // 200  # samples over which interrupted speech falls silent


@dataclasses.dataclass(frozen=True)
class Onset:
    """How an utterance came to its first frame: moments of the engine's clock."""

    pushed: float  # its first sound
    begun: float  # the chunk in which it is
    made: float  # that chunk's frames


@dataclasses.dataclass(frozen=True)
class Frame:
    """A picture and the sound beside it."""

    number: int
    picture: UInt8[np.ndarray, "h w 3"]
    sound: Float32[np.ndarray, " n"]  # at SOUND_RATE
    spoken: int  # samples of it that were pushed
    ends: bool  # the utterance ends here
    media_time: float  # seconds since the stream began
    at: float  # when it leaves, by the engine's clock
    onset: Onset | None = None  # of an utterance whose first frame this is


@dataclasses.dataclass(frozen=True)
class Interrupted:
    """What was cut off."""

    played: float  # seconds of the utterance that left before
    dropped: float  # seconds that were pushed and will not be heard


@dataclasses.dataclass
class Figures:
    """What a session has done so far."""

    frames: int = 0  # that left
    chunks: int = 0
    late_frames: int = 0  # that were made after their moment
    lost_frames: int = 0  # that nobody took in time
    hurried_frames: int = 0  # of silence, left out so that a word came sooner
    stalled: float = 0.0  # seconds by which the clock was moved


class LiveSession:
    """Made by `Engine.open`."""

    def __init__(self, engine: "Engine", first_frame: int = 0):
        self._engine, self.model, self._first_frame = engine, engine.model, first_frame
        self.voice = Voice(engine.model.sample_rate)
        self.figures = Figures()
        self._lock = threading.Lock()
        self._state: State = None
        self._said: Said | None = None
        self._said_at = 0.0
        self._hurried = False  # since the last chunk
        self._changes: list[tuple[Change, Future]] = []
        self._waiting: deque[Frame] = deque()
        self._begun_at: float | None = None  # when frame 0 leaves; None until frames are asked for
        self._closed = False
        self._error: BaseException | None = None
        self._played = 0  # samples of the present utterance that left
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: asyncio.Event | None = None

    # What plug-ins call.

    async def push_audio(self, pcm: Float32[np.ndarray, " n"], sample_rate: int) -> None:
        """Speech, at any speed.

        Args:
          pcm: mono, in [-1, 1].

        Raises:
          ValueError, VoiceFull: see `Voice.push`.
        """
        self.voice.push(pcm, sample_rate, self._engine.clock())
        self._engine.wake()

    async def end_utterance(self) -> None:
        """What was pushed is complete: its last piece need not wait for more."""
        self.voice.end()
        self._engine.wake()

    async def interrupt(self) -> Interrupted:
        """Falls silent now; the face goes on."""
        with self._lock:
            dropped = self.voice.clear()
            spoken = sum(frame.spoken for frame in self._waiting)
            self._waiting = deque(
                dataclasses.replace(frame, sound=_silenced(frame.sound, first=n == 0), spoken=0, ends=False) for n, frame in enumerate(self._waiting)
            )
            if self._said is not None:  # a chunk that is being made
                spoken += self._said.spoken
                self._said = dataclasses.replace(self._said, sound=np.zeros_like(self._said.sound), spoken=0, ends=False)
            played, self._played = self._played / SOUND_RATE, 0
        return Interrupted(played, dropped + spoken / SOUND_RATE)

    async def set_prompt(self, prompt: str) -> float:
        """Another prompt, computed beside the stream and put in between two chunks.

        Returns:
          The media time, in seconds, from which on it shows.
        """
        return await self._change(self.model.prompt_change, prompt)

    async def set_reference(self, image: UInt8[np.ndarray, "h w 3"]) -> float:
        """Another face, likewise.

        Raises:
          ValueError: a picture of another size than the model's.
        """
        wanted = (self.model.height, self.model.width, 3)
        if image.shape != wanted:
            raise ValueError(f"the picture has shape {image.shape}, the model takes {wanted}: resize it first")
        return await self._change(self.model.reference_change, image)

    async def frames(self) -> AsyncIterator[Frame]:
        """Frames at their moments, until the session is closed. For one taker.

        Raises:
          RuntimeError: the engine has failed.
        """
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        if self._begun_at is None:
            self._begun_at = self._engine.clock() + self._engine.lead
        self._engine.wake()
        while True:
            with self._lock:
                frame = self._waiting[0] if self._waiting else None
                if frame is None and self._closed:
                    break
                self._arrived.clear()
            if frame is None:
                await self._arrived.wait()
                continue
            if (wait := frame.at - self._engine.clock()) > 0:
                await asyncio.sleep(wait)
            with self._lock:  # it may have fallen silent meanwhile, or been dropped
                if not self._waiting or self._waiting[0].number != frame.number:
                    continue
                frame = self._waiting.popleft()
                self._played = 0 if frame.ends else self._played + frame.spoken
                self.figures.frames += 1
            yield frame
        if self._error is not None:
            raise RuntimeError(f"the engine has failed: {self._error}") from self._error

    async def close(self) -> None:
        """Ends the session; frames that wait are dropped."""
        self._engine.remove(self)
        with self._lock:
            self._waiting.clear()
        self.ended()

    @property
    def latency(self) -> float:
        """Seconds between the moment at which a chunk's sound is cut and its first frame."""
        return self._engine.lead

    def report(self) -> dict[str, Any]:
        """Plain figures."""
        steps = self._engine.steps
        return dataclasses.asdict(self.figures) | {
            "waiting_speech_seconds": round(self.voice.seconds, 3),
            "real_time_factor": round(self._engine.chunk_seconds / steps.p50, 3),
            "chunk_ms": {name: round(1e3 * value, 1) for name, value in dataclasses.asdict(steps).items()},
            "lead_ms": round(1e3 * self._engine.lead, 1),
        }

    # What the engine's thread calls.

    def begin(self, state: State) -> None:
        """The stream's first state."""
        self._state = state

    def begins(self) -> float | None:
        """When the next chunk is to be begun; None while nobody takes frames."""
        if self._begun_at is None or self._state is None or self._closed:
            return None
        return self._due() - self._engine.lead

    def hurry(self, now: float, fits: Callable[[float], bool]) -> None:
        """Leaves out frames of silence, evenly, so that the word that waits comes by as much sooner; mostly there is nothing to do.

        Args:
          fits: whether the next chunk may be begun at such a moment.
        """
        if self._closed or self._hurried or not self.voice.ready(self._engine.chunk_seconds + AHEAD):
            return
        fps, lead = self.model.fps, self._engine.lead
        with self._lock:  # all of it: frames leave meanwhile
            count = len(self._waiting)
            if not count or any(frame.spoken or frame.ends for frame in self._waiting):
                return
            first = self._waiting[0]
            # The first stays, which may be on its way out, and enough of them to show until the next chunk is made.
            kept = max(1, math.ceil(count / 2), math.ceil((now + lead - first.at) * fps))
            if kept >= count or not fits(first.at + kept / fps - lead):
                return
            self._waiting = deque(
                dataclasses.replace(self._waiting[n * count // kept], number=first.number + n, media_time=(first.number + n) / fps, at=first.at + n / fps)
                for n in range(kept)
            )
            self.figures.hurried_frames += count - kept
            self._hurried = True

    def _shown(self) -> int:
        """Frames of all chunks so far, but for those left out."""
        return self.figures.chunks * self.model.chunk_frames - self.figures.hurried_frames

    def _due(self) -> float:
        """When the next chunk's first frame leaves."""
        return self._begun_at + self._shown() / self.model.fps

    def next_input(self) -> tuple[State, int, Float32[np.ndarray, " n"]]:
        """The state, with what was changed, the number of the chunk and its sound."""
        with self._lock:
            changes, self._changes = self._changes, []
        state, self._state = self._state, None
        for change, landed in changes:
            state = change(state)
            if landed.set_running_or_notify_cancel():  # whoever asked may be gone
                landed.set_result((self._first_frame + self._shown()) / self.model.fps)
        said = self.voice.take(self.model.chunk_samples(self.figures.chunks))
        with self._lock:
            self._said, self._said_at = said, self._engine.clock()
        return state, self.figures.chunks, said.speech

    def deliver(self, state: State, pictures: UInt8[np.ndarray, "t h w 3"], now: float) -> None:
        """A chunk is made."""
        fps, count = self.model.fps, len(pictures)
        with self._lock:
            self._state, self._hurried = state, False
            said, self._said = self._said, None
            if self._closed:
                return
            first = self._shown()
            if (late := now - self._due()) > 0:
                self.figures.late_frames += min(count, int(late * fps) + 1)
                if late > TOLERATED:
                    self.figures.stalled += late
                    self._begun_at += late
            cuts = np.round(np.arange(count + 1) * len(said.sound) / count).astype(int)
            for j, (begin, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
                spoken = max(0, min(end, said.spoken) - begin)
                ends = said.ends and begin < said.spoken <= end or said.ends and said.spoken == 0 and j == 0
                number = self._first_frame + first + j
                onset = Onset(said.pushed, self._said_at, now) if j == 0 and said.pushed is not None and spoken else None
                self._waiting.append(Frame(number, pictures[j], said.sound[begin:end], spoken, ends, number / fps, self._begun_at + (first + j) / fps, onset))
            self.figures.chunks += 1
            while len(self._waiting) > BACKLOG * fps + count and self._waiting[0].at < now - BACKLOG:
                self._waiting.popleft()
                self.figures.lost_frames += 1
        self._notify()

    def ended(self, error: BaseException | None = None) -> None:
        """No more chunks come."""
        with self._lock:
            self._closed, self._error = True, error
            changes, self._changes = self._changes, []
        for _, landed in changes:
            if landed.set_running_or_notify_cancel():
                landed.set_exception(RuntimeError("the session has ended"))
        self._notify()

    async def _change(self, prepare, value) -> float:
        loop = asyncio.get_running_loop()
        change = await loop.run_in_executor(self._engine.background, prepare, value)
        landed: Future = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the session is closed")
            self._changes.append((change, landed))
            waits = self._begun_at is not None
        if not waits:  # nobody takes frames: it shows from the first one on
            return self._first_frame / self.model.fps
        return await asyncio.wrap_future(landed)

    def _notify(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arrived.set)


def _silenced(sound: Float32[np.ndarray, " n"], first: bool) -> Float32[np.ndarray, " n"]:
    """Silence, into which the first stretch fades."""
    silent = np.zeros_like(sound)
    if first:
        fade = min(FADE, len(sound))
        silent[:fade] = sound[:fade] * np.linspace(1.0, 0.0, fade, dtype=np.float32)
    return silent
