"""Where a stream goes: standard output, a file, or RTP (in `rtp`)."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import av

from pikastream_jax.serving.encode import MediaFormat, add_audio, add_video
from pikastream_jax.serving.errors import ReaderClosed, ServeError

# Every packet leaves when it is muxed: no waiting for a full buffer, nor (microseconds) for the other stream's next.
LIVE = {"flush_packets": "1", "max_interleave_delta": "1", "pes_payload_size": "0"}
_FILES = {
    ".mp4": ("mp4", {"movflags": "faststart"}),
    ".ts": ("mpegts", LIVE),
}


@runtime_checkable
class Output(Protocol):
    """An open stream: encode for `video` and `audio`, hand the packets over in order of time."""

    video: object  # stream of add_video
    audio: object  # stream of add_audio

    def write(self, packet: av.Packet) -> None:
        """Sends one packet. Raises ReaderClosed or ServeError."""

    def close(self) -> None:
        """Ends the stream so that it can be played."""

    def discard(self) -> None:
        """Leaves nothing behind of a stream that was not closed; does nothing after `close`."""


class PipeOutput:
    """MPEG-TS into a file descriptor."""

    def __init__(self, media: MediaFormat, write: Callable[[bytes], None]):
        self._write, self._pending = write, Collector()
        self._container = av.open(self._pending, "w", format="mpegts", options=LIVE)
        self.video = add_video(self._container, media)
        self.audio = add_audio(self._container, media, "aac")
        self._container.start_encoding()

    def write(self, packet: av.Packet) -> None:
        self._container.mux(packet)
        self._flush()

    def close(self) -> None:
        self._container.close()
        self._flush()

    def discard(self) -> None:
        self._container.close()  # into memory, which is dropped

    def _flush(self) -> None:
        # Written here rather than inside the muxer's callback: a closed pipe is then an ordinary exception.
        if data := self._pending.take():
            try:
                self._write(data)
            except BrokenPipeError as error:
                raise ReaderClosed from error
            except OSError as error:
                raise ServeError(f"cannot write to standard output: {error.strerror}") from error


class FileOutput:
    """An .mp4 or .ts file, under another name until it is whole."""

    def __init__(self, path: Path, media: MediaFormat):
        """Raises ServeError: the file cannot be made."""
        container_format, options = _FILES[path.suffix.lower()]
        self._path = path
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._container = None
        try:
            with self._errors():
                self._container = av.open(str(self._part), "w", format=container_format, options=options)
                self.video = add_video(self._container, media)
                self.audio = add_audio(self._container, media, "aac")
                self._container.start_encoding()
        except BaseException:  # Ctrl-C too
            self.discard()
            raise

    def write(self, packet: av.Packet) -> None:
        with self._errors():
            self._container.mux(packet)

    def close(self) -> None:
        with self._errors():
            self._container.close()
            os.replace(self._part, self._path)

    def discard(self) -> None:
        with contextlib.suppress(OSError, av.FFmpegError):
            if self._container is not None:
                self._container.close()
        self._part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            raise ServeError(f"cannot write {self._path}: {error.strerror or error}") from error


def check_file(path: Path) -> None:
    """Finds out early whether `path` can be an output file.

    Raises:
      ServeError: its kind is unknown or it cannot be written.
    """
    if path.suffix.lower() not in _FILES:
        raise ServeError(f"output {path} must end in {' or '.join(_FILES)}, be - or rtp://HOST:PORT")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Raises ServeError where no file could be made at `path`."""
    folder = path.parent
    if path.is_dir():
        raise ServeError(f"cannot write {path}: it is a directory; give a file name")
    if not folder.is_dir():
        raise ServeError(f"cannot write {path}: there is no directory {folder}; make it first")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ServeError(f"cannot write {path}: permission denied; choose another place")


def write_whole(path: Path, text: str) -> None:
    """A text file, line ends as given, whole or not at all. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, newline="")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def check_stdout() -> None:
    """Raises ServeError where standard output is a terminal, which a video would only garble."""
    if sys.stdout is None or sys.stdout.isatty():
        raise ServeError("standard output is a terminal: pipe it (| ffplay -), or give --output FILE.mp4")


def stdout_writer() -> Callable[[bytes], None]:
    """Writes to standard output at once.

    Past Python's buffer: whatever that still held when the reader goes away would be complained about at exit.
    """
    descriptor = sys.stdout.fileno()

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    return write


class Collector:
    """A file for PyAV to write into."""

    def __init__(self):
        self._data = bytearray()

    def write(self, data) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        data, self._data = bytes(self._data), bytearray()
        return data
