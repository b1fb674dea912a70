"""Reader, model, copy, encoder and output as five threads over bounded queues.

    audio -> [reader] -> AudioChunk -> [model] -> _Begun -> [copy] -> VideoChunk -> [encoder] -> packets -> [output]

A slow output fills the queues and so slows the model down; nothing grows. The model's thread hands work to the device and does not wait for
it: a chunk is copied to host memory, encoded and sent while the device works on the next one.
"""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import av
import numpy as np
from jaxtyping import Float32, UInt8

from pikastream_jax.serving.audio_in import AudioSource
from pikastream_jax.serving.chunks import MASTER_RATE, AudioChunk, audio_chunks
from pikastream_jax.serving.encode import Encoder, MediaFormat, packet_time
from pikastream_jax.serving.errors import ReaderClosed
from pikastream_jax.serving.metrics import Meter, Progress
from pikastream_jax.serving.outputs import Output
from pikastream_jax.serving.queues import BoundedQueue, Cancelled
from pikastream_jax.serving.timeline import frame_count, output_frames

SEND_GRACE = 1.0  # seconds that a packet under way may take after a second Ctrl-C; a reader that has stopped reading would take for ever
SLOTS = 3  # one chunk that the device works on, one that it goes on with, one that the encoder may take
QUEUE_CHUNKS = 2  # one being read and one ready hides the jitter of a stage; more would only add latency


@runtime_checkable
class Session(Protocol):
    """One stream of one face."""

    reconstruction_psnr: float  # dB, of the reference picture through FlashVAE

    def step(self, audio: Float32[np.ndarray, " n"]) -> Any:
        """The next chunk of sound -> the frames [t, h, w, 3] of the oldest chunk that is ready, uint8; `np.asarray` waits for them."""

    def finish(self) -> Iterable[Any]:
        """The frames of each chunk that was not ready when the sound ended, as `step` gives them."""


@runtime_checkable
class Generator(Protocol):
    """What serving needs from `pikastream_jax.streaming.generator`."""

    fps: int
    height: int  # pixels
    width: int
    sample_rate: int  # Hz
    chunk_frames: int
    psnr_warning: float  # dB; a reference reproduced worse than this is unlike the training faces

    def chunk_samples(self, index: int) -> int:
        """Samples of chunk `index`."""

    def session(self, image: UInt8[np.ndarray, "height width 3"], prompt: str, seed: int) -> Session:
        """A new stream."""


@dataclasses.dataclass(frozen=True)
class VideoChunk:
    """A chunk on its way to the encoder."""

    audio: AudioChunk
    frames: UInt8[np.ndarray, "t h w 3"]


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A chunk that the device works on."""

    audio: AudioChunk
    frames: Any  # uint8 [t, h, w, 3], on the device or on the way from it
    at: float  # seconds of `time.perf_counter`


class Pipeline:
    """Runs one stream from `source` through `session` to `output`."""

    def __init__(
        self,
        source: AudioSource,
        generator: Generator,
        session: Session,
        output: Output,
        media: MediaFormat,
        meter: Meter,
        progress: Progress,
        realtime: bool = False,
    ):
        """realtime: sound is taken no faster than it sounds, and packets leave on the media clock."""
        self._source, self._generator, self._session = source, generator, session
        self._output, self._media, self._meter, self._progress = output, media, meter, progress
        self._realtime = realtime
        self._audio: BoundedQueue[AudioChunk] = BoundedQueue(QUEUE_CHUNKS)
        # A chunk takes a slot when it is begun and leaves it when the encoder takes it, so these two queues are never full: whoever waits for
        # the device waits for nothing else, and its times are the device's.
        self._slots: BoundedQueue[None] = BoundedQueue(SLOTS)
        self._begun: BoundedQueue[_Begun] = BoundedQueue(SLOTS)
        self._video: BoundedQueue[VideoChunk] = BoundedQueue(SLOTS)
        self._packets: BoundedQueue[_Encoded] = BoundedQueue(QUEUE_CHUNKS)
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._lock = threading.Lock()

    def run(self) -> None:
        """Streams to the end of the sound, to Ctrl-C, or until the reader of the output goes away.

        The first KeyboardInterrupt (Ctrl-C) ends the stream after the present chunk; a second one does not wait. The
        output is closed, so that it can be played, unless there is nothing to play or nobody to play it.

        Raises:
          ServeError, or whatever else made a stage fail.
        """
        self._meter.started_at = time.perf_counter()
        # Not Thread.join: once interrupted by Ctrl-C, CPython (3.11, 3.12) takes the thread for ended.
        ended = {stage: threading.Event() for stage in (self._read, self._generate, self._copy, self._encode, self._send)}
        for stage, event in ended.items():
            threading.Thread(target=self._guard, args=(stage, event), daemon=True).start()
        try:
            try:
                ended[self._send].wait()
            except KeyboardInterrupt:
                self._meter.end = "interrupted"
                self._stop()
                ended[self._send].wait()
        except KeyboardInterrupt as error:
            self._fail(error)
        for stage in (self._generate, self._copy, self._encode):  # not the reader: it may wait for sound that never comes
            ended[stage].wait()
        ended[self._send].wait(SEND_GRACE)  # after a second Ctrl-C: nobody may close the output while it is written to
        self._meter.ended_at = time.perf_counter()
        self._progress.close()
        if self._failure is None and self._meter.frames:
            self._close_output()
        failure = self._failure
        if isinstance(failure, ReaderClosed):
            self._meter.end = "reader closed"
        elif failure is not None:
            raise failure

    def _close_output(self) -> None:
        """Closes the output; one Ctrl-C does not spoil a stream that is complete."""
        closed = threading.Event()
        threading.Thread(target=self._guard, args=(self._output.close, closed), daemon=True).start()
        try:
            closed.wait()
        except KeyboardInterrupt:
            closed.wait()

    def _stop(self) -> None:
        """No further sound; what the model has begun is still finished and sent."""
        self._stopping.set()
        self._audio.cancel()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
        self._stopping.set()
        for queue in (self._audio, self._slots, self._begun, self._video, self._packets):
            queue.cancel()

    def _guard(self, stage: Callable[[], None], ended: threading.Event) -> None:
        try:
            stage()
        except Cancelled:
            pass
        except BaseException as error:  # carried to the main thread
            self._fail(error)
        finally:
            ended.set()

    def _read(self) -> None:
        media_time = Fraction(0)
        for chunk in audio_chunks(self._source, self._generator.chunk_samples, self._generator.sample_rate):
            media_time += Fraction(len(chunk.master), MASTER_RATE)
            if self._realtime:
                self._wait_until(self._meter.started_at + float(media_time))
                chunk = dataclasses.replace(chunk, ready_at=time.perf_counter())
            self._audio.put(chunk)
        self._audio.close()

    def _generate(self) -> None:
        waiting: deque[AudioChunk] = deque()  # whose frames are not ready
        for chunk in self._audio:
            waiting.append(chunk)
            at = time.perf_counter()
            frames = self._session.step(chunk.speech)
            if len(frames):
                self._begin(waiting.popleft(), frames, at)
        if self._failure is not None:
            return
        at = time.perf_counter()
        for chunk, frames in zip(waiting, self._session.finish(), strict=True):
            self._begin(chunk, frames, at)
            at = time.perf_counter()
        self._begun.close()

    def _begin(self, chunk: AudioChunk, frames: Any, at: float) -> None:
        self._slots.put(None)
        self._begun.put(_Begun(chunk, frames, at))

    def _copy(self) -> None:
        free = 0.0  # when the device was done with the chunk before
        for begun in self._begun:
            frames = np.asarray(begun.frames)  # waits for the device
            ended = time.perf_counter()
            if begun.audio.index == 0:
                self._meter.time_to_first_frame = ended - begun.audio.ready_at
                self._meter.first_chunk_audio_seconds = len(begun.audio.speech) / self._generator.sample_rate
            self._meter.chunk_seconds.append(ended - max(begun.at, free))
            self._meter.generated_frames += len(frames)
            free = ended
            self._video.put(VideoChunk(begun.audio, frames))
        self._video.close()

    def _encode(self) -> None:
        encoder = Encoder(self._output.video, self._output.audio, self._media)
        samples = count = 0
        slots = iter(self._slots)
        for chunk in self._video:
            next(slots, None)
            samples += len(chunk.audio.master)
            shown = output_frames(
                chunk.audio.index * self._generator.chunk_frames,
                self._generator.chunk_frames,
                Fraction(self._generator.fps),
                self._media.fps,
            )
            if chunk.audio.last:
                limit = frame_count(samples, MASTER_RATE, self._media.fps)
                shown = [(number, offset) for number, offset in shown if number < limit]
            count += len(shown)
            packets = encoder.encode(((number, chunk.frames[offset]) for number, offset in shown), chunk.audio.master)
            self._packets.put(_Encoded(packets, count, samples, chunk.audio.ready_at))
        self._packets.put(_Encoded(encoder.finish(), count, samples, 0.0))
        self._packets.close()

    def _send(self) -> None:
        self._progress.start()
        first_at = None
        for encoded in self._packets:
            for packet in encoded.packets:
                if self._failure is not None:
                    return
                if first_at is None:
                    first_at = time.perf_counter()
                if self._realtime:
                    self._wait_until(first_at + float(packet_time(packet)))
                self._output.write(packet)
                if self._meter.time_to_first_byte is None:
                    self._meter.time_to_first_byte = time.perf_counter() - encoded.ready_at
            self._meter.frames = encoded.frames
            self._meter.video_seconds = float(encoded.frames / self._media.fps)
            self._meter.audio_seconds = encoded.samples / MASTER_RATE
            self._progress.update()

    def _wait_until(self, moment: float) -> None:
        self._stopping.wait(max(0.0, moment - time.perf_counter()))


@dataclasses.dataclass(frozen=True)
class _Encoded:
    packets: list[av.Packet]
    frames: int  # of the stream so far
    samples: int  # of the stream so far, at MASTER_RATE
    ready_at: float  # of the chunk's sound
