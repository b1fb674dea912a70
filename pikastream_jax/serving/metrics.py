"""How fast a run was: the progress line and the JSON report."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pikastream_jax.serving.outputs import write_whole

PACKAGES = ("pikastream-jax", "jax", "jaxlib", "flax", "numpy", "av", "soundfile", "Pillow")


@dataclasses.dataclass
class Meter:
    """Collects figures while a stream runs. Times are seconds of `time.perf_counter`.

    Each field is written by one stage only; the report is read when all have ended.
    """

    started_at: float = 0.0  # the clock of speed starts with the first audio read, after loading
    ended_at: float = 0.0
    startup_seconds: float = 0.0  # loading, compiling, encoding the reference
    chunk_seconds: list[float] = dataclasses.field(default_factory=list)  # one model step each
    time_to_first_frame: float | None = None  # from the last needed sample present to the frame in host memory
    time_to_first_byte: float | None = None  # the same to the first encoded byte handed over
    first_chunk_audio_seconds: float = 0.0  # sound that the first chunk has to collect
    generated_frames: int = 0
    frames: int = 0  # put out, after --fps and trimming
    audio_seconds: float = 0.0
    video_seconds: float = 0.0
    reconstruction_psnr: float | None = None  # dB, of the reference picture
    end: str = "finished"  # or "interrupted", "reader closed"

    @property
    def elapsed(self) -> float:
        """Seconds since the start of the stream."""
        return max((self.ended_at or time.perf_counter()) - self.started_at, 1e-9)

    @property
    def real_time_factor(self) -> float:
        """Seconds of video put out in one second."""
        return self.video_seconds / self.elapsed

    def report(self) -> dict:
        """Everything, as plain JSON values."""
        chunks = np.asarray(self.chunk_seconds)
        return {
            "frames": self.frames,
            "generated_frames": self.generated_frames,
            "seconds": round(self.elapsed, 4),
            "fps": round(self.frames / self.elapsed, 3),
            "real_time_factor": round(self.real_time_factor, 4),
            "time_to_first_frame_seconds": _rounded(self.time_to_first_frame),
            "time_to_first_byte_seconds": _rounded(self.time_to_first_byte),
            "first_chunk_audio_seconds": round(self.first_chunk_audio_seconds, 4),
            "startup_seconds": round(self.startup_seconds, 4),
            "chunk_seconds": {
                "count": len(chunks),
                "p50": _rounded(float(np.percentile(chunks, 50)) if len(chunks) else None),
                "p95": _rounded(float(np.percentile(chunks, 95)) if len(chunks) else None),
            },
            "audio_seconds": round(self.audio_seconds, 6),
            "video_seconds": round(self.video_seconds, 6),
            "reconstruction_psnr_db": _rounded(self.reconstruction_psnr),
            "end": self.end,
            "versions": {"python": platform.python_version(), **_versions()},
            "cpus": os.cpu_count(),
        }

    def write(self, path: Path) -> None:
        """The report as a JSON file, whole or not at all. Raises OSError."""
        write_whole(path, json.dumps(self.report(), indent=2) + "\n")


class Progress:
    """One line on stderr: frames, FPS, real-time factor, first-frame latency."""

    def __init__(self, meter: Meter, total_frames: int | None):
        """total_frames: None for a live source."""
        self._meter, self._total, self._bar = meter, total_frames, None

    def start(self) -> None:
        """Shows the line. In the thread that updates it: Ctrl-C strikes the main one, and tqdm is not ready for that."""
        self._bar = tqdm(
            total=self._total, unit="frame", file=sys.stderr, mininterval=0.5, miniters=1, dynamic_ncols=True
        )

    def update(self) -> None:
        """Shows the meter's present state."""
        text = f"{self._meter.frames / self._meter.elapsed:.1f} FPS, RTF {self._meter.real_time_factor:.2f}"
        if self._meter.time_to_first_frame is not None:
            text += f", first frame {self._meter.time_to_first_frame * 1000:.0f} ms"
        first = not self._bar.n
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(self._meter.frames - self._bar.n)
        if first:
            self._bar.refresh()  # the latency is news at once, whatever the interval

    def close(self) -> None:
        """Leaves the line as it is."""
        if self._bar is not None:
            self.update()
            self._bar.close()


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 4)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
            continue
    return found
