"""Reader, model, encoder and output as four threads over bounded queues.

    audio -> [reader] -> AudioChunk -> [model] -> VideoChunk -> [encoder] -> packets -> [output]

A slow output fills the queues and so slows the model down; nothing grows. A chunk is encoded and sent while the
model works on the next one.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol, runtime_checkable

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
QUEUE_CHUNKS = 2  # one being read and one ready hides the jitter of a stage; more would only add latency


@runtime_checkable
class Session(Protocol):
    """One stream of one face."""

    reconstruction_psnr: float  # dB, of the reference picture through FlashVAE

    def step(self, audio: Float32[np.ndarray, " n"]) -> UInt8[np.ndarray, "t h w 3"]:
        """The next chunk of sound -> its frames."""


@runtime_checkable
class Generator(Protocol):
    """What serving needs from `pikastream_jax.streaming.generator`."""

    fps: int
    size: int  # pixels each way
    sample_rate: int  # Hz
    chunk_frames: int
    psnr_warning: float  # dB; a reference reproduced worse than this is unlike the training faces

    def chunk_samples(self, index: int) -> int:
        """Samples of chunk `index`."""

    def session(self, image: UInt8[np.ndarray, "size size 3"], prompt: str, seed: int) -> Session:
        """A new stream."""


@dataclasses.dataclass(frozen=True)
class VideoChunk:
    """A chunk on its way to the encoder."""

    audio: AudioChunk
    frames: UInt8[np.ndarray, "t h w 3"]


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
        self._video: BoundedQueue[VideoChunk] = BoundedQueue(QUEUE_CHUNKS)
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
        ended = {stage: threading.Event() for stage in (self._read, self._generate, self._encode, self._send)}
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
        for stage in (self._generate, self._encode):  # not the reader: it may wait for sound that never comes
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
        for queue in (self._audio, self._video, self._packets):
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
        for chunk in self._audio:
            began = time.perf_counter()
            frames = np.asarray(self._session.step(chunk.speech))  # waits for the device
            ended = time.perf_counter()
            if chunk.index == 0:
                self._meter.time_to_first_frame = ended - chunk.ready_at
                self._meter.first_chunk_audio_seconds = len(chunk.speech) / self._generator.sample_rate
            self._meter.chunk_seconds.append(ended - began)
            self._meter.generated_frames += len(frames)
            self._video.put(VideoChunk(chunk, frames))
        self._video.close()

    def _encode(self) -> None:
        encoder = Encoder(self._output.video, self._output.audio, self._media)
        samples = count = 0
        for chunk in self._video:
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
