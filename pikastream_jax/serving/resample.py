"""Sample rate conversion of a stream, without delay."""

import av
import numpy as np
from jaxtyping import Float32


class StreamResampler:
    """Blocks at one rate in, blocks at another out, through FFmpeg's windowed-sinc resampler.

    Output sample k sits at input time k / `rate_out`: the filter's delay is already taken off, so that a sound is
    neither early nor late, and what has not come out yet is at most 2 ms of the input (16 samples at the lower
    rate and a bit). The total is round(n * rate_out / rate_in), exactly.
    """

    def __init__(self, rate_in: int, rate_out: int, channels: int):
        """channels: 1 or 2."""
        if channels not in (1, 2):
            raise ValueError(f"channels must be 1 or 2, not {channels}; mix down first")
        self._rate_in, self._rate_out, self._channels = rate_in, rate_out, channels
        self._layout = "mono" if channels == 1 else "stereo"
        self._received = self._returned = 0
        self._filter = None
        if rate_in != rate_out:
            self._filter = av.AudioResampler(format="flt", layout=self._layout, rate=rate_out)

    def push(self, block: Float32[np.ndarray, "n channels"]) -> Float32[np.ndarray, "m channels"]:
        """Takes the next samples, returns what is ready."""
        self._received += len(block)
        if self._filter is None or not len(block):
            return block
        packed = np.ascontiguousarray(block, np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=self._layout)
        frame.sample_rate = self._rate_in
        ready = self._collect(self._filter.resample(frame))
        self._returned += len(ready)
        return ready

    def finish(self) -> Float32[np.ndarray, "m channels"]:
        """The rest, once no more samples come."""
        if self._filter is None or not self._received:
            return np.zeros((0, self._channels), np.float32)
        rest = self._collect(self._filter.resample(None))
        missing = (self._received * self._rate_out * 2 + self._rate_in) // (2 * self._rate_in) - self._returned
        rest = rest[:missing]  # a sample too many or too few: FFmpeg rounds the length its own way
        return np.pad(rest, ((0, missing - len(rest)), (0, 0)))

    def _collect(self, frames) -> Float32[np.ndarray, "m channels"]:
        blocks = [frame.to_ndarray().reshape(-1, self._channels) for frame in frames]
        if not blocks:
            return np.zeros((0, self._channels), np.float32)
        return np.clip(np.concatenate(blocks), -1.0, 1.0)  # between loud samples a band-limited curve goes higher
