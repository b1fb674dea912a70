"""The header of a WAV file, read from a stream that cannot seek, and its samples as float."""

import dataclasses
import struct
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from pikastream_jax.serving.errors import ServeError

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
# Writers that do not know the length yet put 0 or something near the largest 32-bit number (ffmpeg: 2^32 - 1,
# sox: 2^31 - 4096, arecord: 2^31).
_OPEN_ENDED = 0x7FFFF000


@dataclasses.dataclass(frozen=True)
class PcmFormat:
    """How the bytes of a PCM stream become samples."""

    rate: int  # Hz
    channels: int
    bits: int  # per sample: 8 (unsigned), 16, 24, 32 integer; 32, 64 float
    is_float: bool = False
    data_bytes: int | None = None  # length of the samples; None: until the stream ends

    @property
    def frame_bytes(self) -> int:
        """Bytes of one sample in every channel."""
        return self.bits // 8 * self.channels

    def to_float(self, data: bytes) -> Float32[np.ndarray, "n channels"]:
        """Whole frames of bytes -> samples, full scale 1."""
        if self.is_float:
            samples = np.frombuffer(data, f"<f{self.bits // 8}").astype(np.float32)
        elif self.bits == 8:
            samples = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
        elif self.bits == 24:
            wide = np.zeros((len(data) // 3, 4), np.uint8)
            wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
            samples = (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
        else:
            samples = (np.frombuffer(data, f"<i{self.bits // 8}") / 2.0 ** (self.bits - 1)).astype(np.float32)
        return samples.reshape(-1, self.channels)


def read_wav_header(read: Callable[[int], bytes], name: str) -> PcmFormat | None:
    """Reads a RIFF header up to the first sample.

    Args:
      read: returns exactly the number of bytes asked for, fewer only at the end.
      name: what to call the input in messages.
    Returns:
      The format, or None where the samples are coded (ADPCM, mu-law, ...).
    Raises:
      ServeError: the header ends early or describes nothing that can be played.
    """

    def need(count: int) -> bytes:
        data = read(count)
        if len(data) < count:
            raise ServeError(f"{name} is truncated: it ends inside its WAV header; record or copy it again")
        return data

    if need(12)[8:] != b"WAVE":
        raise ServeError(f"{name} is a RIFF file but not a WAV; give WAV or raw 16-bit PCM")
    pcm = None
    while True:
        chunk, size = struct.unpack("<4sI", need(8))
        if chunk == b"data":
            if pcm is None:
                raise ServeError(f"{name} has a WAV header without a format; record it again")
            return dataclasses.replace(pcm, data_bytes=None if size == 0 or size >= _OPEN_ENDED else size)
        body = need(size + size % 2)
        if chunk != b"fmt ":
            continue
        if size < 16:
            raise ServeError(f"{name} has a WAV format of {size} bytes; at least 16 are needed")
        tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
        if tag == _EXTENSIBLE and size >= 26:
            tag = struct.unpack("<H", body[24:26])[0]
        if (tag, bits) not in {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}:
            return None
        if not channels or not rate:
            raise ServeError(f"{name} has a WAV header with {channels} channels at {rate} Hz; both must be above 0")
        pcm = PcmFormat(rate, channels, bits, tag == _FLOAT)
