"""Recorded or live sound as blocks of float samples: files through soundfile and PyAV, pipes as they arrive."""

import dataclasses
import os
import stat
import sys
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol, runtime_checkable

import av
import numpy as np
import soundfile
from jaxtyping import Float32

from pikastream_jax.serving.errors import ServeError
from pikastream_jax.serving.wav import PcmFormat, read_wav_header

BLOCK = 8192  # samples read at a time from a file
SILENCE = 1e-4  # peak (-80 dBFS) below which a recording is called silent
MIN_RATE, MAX_RATE = 4_000, 768_000  # Hz
# (offset, bytes) that a file starts with, for a pipe that carries one by mistake. (MP3 without tags is left out: its sync word is
# also a plain 16-bit sample.)
_NOT_PCM = {
    (0, b"fLaC"): "FLAC",
    (0, b"OggS"): "Ogg",
    (0, b"ID3"): "MP3",
    (0, b"FORM"): "AIFF",
    (0, b"RF64"): "RF64",
    (0, b"RIFX"): "big-endian WAV",
    (0, b"\x1aE\xdf\xa3"): "Matroska",
    (0, b"\x89PNG"): "PNG",
    (4, b"ftyp"): "MP4 or M4A",
}


@runtime_checkable
class AudioSource(Protocol):
    """Sound with a known rate, to be read once (a pipe) or many times (a file)."""

    name: str
    rate: int  # Hz
    channels: int
    live: bool  # a pipe: it can be read once only, at the pace it comes

    def blocks(self) -> Iterator[Float32[np.ndarray, "n channels"]]:
        """Blocks of any length, in order. Raises ServeError where the sound is damaged."""


@dataclasses.dataclass(frozen=True)
class SoundFile:
    """What libsndfile reads: WAV, FLAC, Ogg Vorbis and Opus, AIFF, ... (for MP3 see `open_audio`)."""

    name: str
    rate: int
    channels: int
    live: ClassVar[bool] = False

    def blocks(self) -> Iterator[Float32[np.ndarray, "n channels"]]:
        count = 0
        try:
            with soundfile.SoundFile(self.name) as file:
                promised = file.frames
                while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                    count += len(block)
                    yield block
        except soundfile.LibsndfileError as error:
            raise ServeError(f"{self.name} is damaged after {count / self.rate:.2f} s: {_one_line(error)}") from error
        _require_whole(self.name, promised / self.rate, count / self.rate)


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """What FFmpeg reads and libsndfile does not, or not well: M4A, MP4, WebM, MP3, ... The first audio stream is used."""

    name: str
    rate: int
    channels: int
    live: ClassVar[bool] = False

    def blocks(self) -> Iterator[Float32[np.ndarray, "n channels"]]:
        count, promised = 0, 0.0
        try:
            with av.open(self.name) as container:
                stream = container.streams.audio[0]
                if "mp4" in container.format.name and stream.duration:  # elsewhere the duration is a guess
                    promised = float(stream.duration * stream.time_base)
                resampler = av.AudioResampler(format="flt")  # of the sample format only
                for packet in container.demux(stream):
                    for frame in packet.decode():
                        for same in resampler.resample(frame):
                            block = same.to_ndarray().reshape(-1, self.channels)
                            count += len(block)
                            yield block
        except (av.FFmpegError, ValueError) as error:
            raise ServeError(f"{self.name} is damaged after {count / self.rate:.2f} s: {_one_line(error)}") from error
        _require_whole(self.name, promised, count / self.rate)


@dataclasses.dataclass(frozen=True)
class PcmStream:
    """PCM from a pipe, handed on as it arrives.

    `read(n)` waits for at least one byte and returns at most n; b"" at the end.
    """

    name: str
    pcm: PcmFormat
    read: Callable[[int], bytes]
    head: bytes = b""  # already read
    live: ClassVar[bool] = True

    @property
    def rate(self) -> int:
        return self.pcm.rate

    @property
    def channels(self) -> int:
        return self.pcm.channels

    def blocks(self) -> Iterator[Float32[np.ndarray, "n channels"]]:
        left = self.pcm.data_bytes if self.pcm.data_bytes is not None else sys.maxsize
        rest = self.head
        while left > 0:
            data = rest or self.read(min(left, BLOCK * self.pcm.frame_bytes))
            if rest and len(rest) < self.pcm.frame_bytes:
                more = self.read(BLOCK * self.pcm.frame_bytes)
                data = rest + more if more else b""
            if not data:
                return  # a live source may stop early: what came has been shown already
            data = data[:left]
            whole = len(data) // self.pcm.frame_bytes * self.pcm.frame_bytes
            rest = data[whole:]
            left -= whole
            if whole:
                yield self.pcm.to_float(data[:whole])
            elif left < self.pcm.frame_bytes:
                return


def check_stdin() -> None:
    """Raises ServeError where standard input cannot carry sound."""
    if sys.stdin is None or sys.stdin.isatty():
        raise ServeError("standard input is a terminal: pipe WAV or raw 16-bit PCM into it, or give --audio FILE")


def open_audio(path: str, raw_rate: int) -> AudioSource:
    """The sound at `path`; `-` is standard input, and a named pipe is read like it.

    Args:
      path: a file of any kind that soundfile or FFmpeg reads, a pipe, or `-`.
      raw_rate: Hz of a pipe without a WAV header, which is then raw 16-bit little-endian mono.
    Raises:
      ServeError: there is nothing to read or it is not sound.
    """
    if path == "-":
        check_stdin()
        descriptor = sys.stdin.fileno()  # not sys.stdin.buffer: a thread waiting in it would block the way out
        return open_pcm_stream(lambda count: os.read(descriptor, count), "standard input", raw_rate)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ServeError(f"cannot read audio {path}: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise ServeError(f"audio {path} is a directory; give a file")
    if stat.S_ISFIFO(mode):
        pipe = open(path, "rb", buffering=0)  # it lives as long as the stream
        return open_pcm_stream(pipe.read, path, raw_rate)
    return _open_file(path)


def _open_file(path: str) -> AudioSource:
    try:
        with open(path, "rb") as file:
            head = file.read(4)
            if not head:
                raise ServeError(f"audio {path} is empty")
            if head == b"RIFF":
                file.seek(0)
                pcm = read_wav_header(file.read, path)
                if pcm and pcm.data_bytes:  # libsndfile would shorten the length without a word
                    bytes_per_second = pcm.frame_bytes * pcm.rate
                    present = os.path.getsize(path) - file.tell()
                    _require_whole(path, pcm.data_bytes / bytes_per_second, present / bytes_per_second)
    except OSError as error:
        raise ServeError(f"cannot read audio {path}: {error.strerror}") from error
    try:
        info = soundfile.info(path)
        # MP3 goes the other way: soundfile seeks after every block, and libsndfile loses its place in MP3 by that.
        if info.format != "MP3":
            return _checked(SoundFile(path, info.samplerate, info.channels))
    except soundfile.LibsndfileError:
        pass  # not one of its formats
    try:
        with av.open(path) as container:
            if not container.streams.audio:
                raise ServeError(f"{path} holds no audio; give WAV, FLAC, OGG, MP3 or M4A")
            stream = container.streams.audio[0]
            return _checked(MediaFile(path, stream.rate or 0, stream.channels or 0))
    except av.FFmpegError as error:
        raise ServeError(
            f"{path} is not audio, or is damaged ({_one_line(error)}); give WAV, FLAC, OGG, MP3 or M4A"
        ) from error


def open_pcm_stream(read: Callable[[int], bytes], name: str, raw_rate: int) -> PcmStream:
    """A pipe as sound: WAV if it starts with `RIFF`, else raw 16-bit little-endian mono at `raw_rate` Hz.

    Waits for the first bytes.

    Raises:
      ServeError: the pipe is empty, or carries something else.
    """

    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count and (more := read(count - len(data))):
            data += more
        return data

    head = exactly(8)
    if not head:
        raise ServeError(f"{name} ended before any audio came")
    for (offset, magic), kind in _NOT_PCM.items():
        if head.startswith(magic, offset):
            raise ServeError(f"{name} carries {kind}; a pipe may carry WAV or raw 16-bit PCM only: give it as a file")
    if head[:4] != b"RIFF":
        return _checked(PcmStream(name, PcmFormat(raw_rate, 1, 16), read, head))
    rest = iter([head])
    pcm = read_wav_header(lambda count: (got := next(rest, b"")) + exactly(count - len(got)), name)
    if pcm is None:
        raise ServeError(f"{name} carries a coded WAV; a pipe may carry PCM only, so give it as a file")
    return _checked(PcmStream(name, pcm, read))


@dataclasses.dataclass(frozen=True)
class Scan:
    """What reading a file to its end showed."""

    samples: int
    peak: float  # 1 is full scale


def scan(source: AudioSource) -> Scan:
    """Reads `source` once, so that damage is found before anything is written.

    Raises:
      ServeError: the sound is empty, cut off, or holds values that are not numbers.
    """
    samples, peak = 0, 0.0
    for block in checked_blocks(source):
        samples += len(block)
        peak = max(peak, float(np.abs(block).max(initial=0)))
    if not samples:
        raise ServeError(f"audio {source.name} holds no samples")
    return Scan(samples, peak)


def checked_blocks(source: AudioSource) -> Iterator[Float32[np.ndarray, "n channels"]]:
    """The blocks of `source`, in [-1, 1]: louder samples of a float file are clipped, as any output would.

    Raises:
      ServeError: a sample is not a finite number.
    """
    count = 0
    for block in source.blocks():
        bad = ~np.isfinite(block)
        if bad.any():
            where = count + int(np.flatnonzero(bad.any(axis=1))[0])
            value = block[where - count][bad[where - count]][0]
            raise ServeError(
                f"audio {source.name}: sample {where} ({where / source.rate:.3f} s) is {value}; repair the recording"
            )
        count += len(block)
        yield np.clip(block, -1.0, 1.0)


def _checked(source):
    if not MIN_RATE <= source.rate <= MAX_RATE or source.channels < 1:
        raise ServeError(
            f"{source.name} has {source.channels} channels at {source.rate} Hz; "
            f"at least one channel at {MIN_RATE} to {MAX_RATE} Hz is needed"
        )
    return source


def _require_whole(name: str, promised: float, present: float) -> None:
    # A quarter of a second of slack: coded formats round their length to whole blocks.
    if promised - present > (0.25 if present else 0.0):
        raise ServeError(
            f"{name} is truncated: its header promises {promised:.2f} s but {present:.2f} s are there; copy it again"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
