"""One engine, many sessions: a thread that owns the model and gives chunks to sessions, earliest deadline first.

Considered were a thread for each session (they would fight for the device and none would meet its deadlines), a process for each (the weights
once for each), and one worker that goes round. The last it is: the order of chunks is then a decision, made anew before every step.

A chunk is made as late as its frames allow. Its sound is cut when it is begun, so whatever it is begun too early is added to the time between
a word and the lips that say it. `lead` is how long before its first frame is due that is: what the steps of all sessions that are served
take together, with a margin, and never more than a chunk. One that is opened adds to it before its first step, so the others are ahead by then.

Where a step comes late, its stream's clock is moved by as much. Sound and picture move together, and nothing lags for good: speech waits
in a queue until a chunk asks for it, and the next chunk asks as long before its frames as ever.
"""

import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8

from pikastream_jax.live.model import LiveModel
from pikastream_jax.live.session import LiveSession

_log = logging.getLogger(__name__)

ALONE = 0.85  # share of the time that steps of a single session may take; of more sessions, see `LiveModel.load`
MARGIN = 1.25  # of a step's time at the 95th percentile, in `lead`
TRIALS = 8  # steps that are timed at the start
KEPT = 256  # steps whose times are remembered
RETRY = 5.0  # seconds until steps are timed again, on a machine that was too slow for a single session when they were


class EngineFull(Exception):
    """One more session could not be served in real time."""

    retry_after = 30  # seconds


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds of a step, of the last `KEPT`."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds) -> "StepTimes":
        return cls(*(float(np.percentile(list(seconds), q)) for q in (50, 95, 99)))


class Engine:
    """Serves sessions of one model until it is closed.

    Args:
      model: all its programs get compiled here.
      sessions: most that are admitted, where fewer than the machine could serve are wanted.
      clock: seconds.

    Raises:
      ValueError: `sessions` below 1.
    """

    def __init__(self, model: LiveModel, sessions: int | None = None, clock: Callable[[], float] = time.monotonic):
        if sessions is not None and sessions < 1:
            raise ValueError(f"an engine of {sessions} sessions serves nobody: use at least 1")
        self.model, self.clock, self._asked = model, clock, sessions
        self.chunk_seconds = model.chunk_frames / model.fps
        self._changed = threading.Condition()
        self._sessions: list[LiveSession] = []
        self._closed = False
        self.failure: BaseException | None = None
        self._trial, self._trials = self._compile(), 0
        self._measure()
        # What a swap takes to compute is done beside the steps, by one thread: two would only slow them down.
        self.background = ThreadPoolExecutor(1, thread_name_prefix="swaps")
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def steps(self) -> StepTimes:
        """How long steps took lately."""
        return StepTimes.of(self._seconds)

    @property
    def capacity(self) -> int:
        """Sessions that can be served in real time, by the times of the last steps."""
        ratio = self.chunk_seconds / self.steps.p95
        found = self.model.rows * max(math.floor(self.model.load * ratio), min(1, math.floor(ALONE * ratio)))
        return found if self._asked is None else min(found, self._asked)

    @property
    def sessions(self) -> tuple[LiveSession, ...]:
        """Those that are served."""
        with self._changed:
            return tuple(self._sessions)

    def open(self, image: UInt8[np.ndarray, "h w 3"], prompt: str = "", seed: int = 0, first_frame: int = 0) -> LiveSession:
        """A new session; its frames begin to leave when they are asked for.

        Takes as long as encoding a picture: call it in a thread.

        Args:
          first_frame: its number, where a stream goes on that began elsewhere.

        Raises:
          EngineFull: it could not be served in real time.
          RuntimeError: the engine has failed or is closed.
        """
        session = LiveSession(self, first_frame)
        with self._changed:
            self._check()
            capacity = self.capacity
            if len(self._sessions) >= capacity:
                steps = self.steps
                raise EngineFull(
                    f"{len(self._sessions)} sessions are served and {capacity} is the most: a step takes {1e3 * steps.p95:.0f} ms of "
                    f"{1e3 * self.chunk_seconds:.0f} ms (95th percentile); try again later, or on a faster machine"
                )
            self._sessions.append(session)  # its place is taken while its picture is encoded
            self.lead = self._lead()
        try:
            session.begin(self.background.submit(self.model.start, image, prompt, seed).result())
        except BaseException:
            self.remove(session)
            raise
        return session

    def remove(self, session: LiveSession) -> None:
        """Serves it no more; without effect where it is not served."""
        with self._changed:
            if session in self._sessions:
                self._sessions.remove(session)
                self.lead = self._lead()
            self._changed.notify_all()

    def wake(self) -> None:
        """Something about a session has changed."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all sessions."""
        with self._changed:
            self._closed = True
            sessions, self._sessions = self._sessions, []
            self._changed.notify_all()
        for session in sessions:
            session.ended()
        self._thread.join(10.0)
        self.background.shutdown(cancel_futures=True)

    def _lead(self) -> float:
        # Steps that a session may have to wait for, its own included: others fall due when they like, so that even one that shares steps may just miss one.
        turns = 1 + math.ceil(max(0, len(self._sessions) - 1) / self.model.rows)
        return min(self.chunk_seconds, MARGIN * self.steps.p95 * turns + 0.01)

    def _check(self) -> None:
        if self.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.failure}") from self.failure
        if self._closed:
            raise RuntimeError("the engine is closed")

    def _compile(self) -> list:
        """Compiles everything that a live stream runs. Returns the streams on which steps are timed."""
        model = self.model
        blank = np.full((model.height, model.width, 3), 128, np.uint8)
        states = [model.start(blank, "", row) for row in range(model.rows)]
        change = model.prompt_change("a person talking"), model.reference_change(blank)
        states[0] = change[1](change[0](states[0]))
        return states

    def _measure(self) -> None:
        """Times full steps, and forgets all earlier times."""
        seconds = []
        for _ in range(TRIALS + 2):
            sound = np.zeros(self.model.chunk_samples(self._trials), np.float32)
            began = time.perf_counter()
            self._trial, _ = self.model.step([(state, self._trials, sound) for state in self._trial])
            seconds.append(time.perf_counter() - began)
            self._trials += 1
        self._seconds = deque(seconds[2:], maxlen=KEPT)  # the first one may compile
        self.lead = self._lead()

    def _work(self) -> None:
        try:
            while (due := self._due()) is not None:
                if due:
                    self._step(due)
                else:
                    self._measure()
        except BaseException as error:  # carried to whoever waits for frames
            _log.exception("the engine has failed")
            with self._changed:
                self.failure = error
                sessions, self._sessions = self._sessions, []
            for session in sessions:
                session.ended(error)

    def _due(self) -> list[LiveSession] | None:
        """Sessions whose next chunk is to be begun, as many as a step takes, the most urgent first; None when the engine is closed.

        Empty where no session could be admitted and so no step would ever show that the machine is free again.
        """
        with self._changed:
            while not self._closed:
                now = self.clock()
                self._hurry(now)
                waiting = sorted((moment, number) for number, session in enumerate(self._sessions) if (moment := session.begins()) is not None)
                due = [self._sessions[number] for moment, number in waiting if moment <= now]
                if due:
                    return due[: self.model.rows]
                refusing = not self._sessions and not self.capacity
                if not self._changed.wait(RETRY if refusing else waiting[0][0] - now if waiting else None) and refusing and not self._sessions:
                    return []
            return None

    def _hurry(self, now: float) -> None:
        """Lets a session whose word waits go on sooner, where its step does not fall upon another session's."""
        for session in self._sessions:
            others = [at for other in self._sessions if other is not session and (at := other.begins()) is not None]
            session.hurry(now, lambda moment, others=others: all(abs(at - moment) > self.steps.p95 for at in others))

    def _step(self, due: list[LiveSession]) -> None:
        began = time.perf_counter()
        states, frames = self.model.step([session.next_input() for session in due])
        self._seconds.append(time.perf_counter() - began)
        with self._changed:  # somebody may be opening a session
            self.lead = self._lead()  # beside an encoder and a browser, steps take longer than they did at the start
        now = self.clock()
        for session, state, pictures in zip(due, states, frames, strict=True):
            session.deliver(state, pictures, now)
