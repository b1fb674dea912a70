"""Which generated frame an output of another frame rate shows, by media time alone."""

import math
from fractions import Fraction


def output_frames(first: int, count: int, source_fps: Fraction, output_fps: Fraction) -> list[tuple[int, int]]:
    """Output frames that show generated frames `first` ... `first + count - 1`.

    Generated frame j is on screen from j / source_fps until its successor; output frame k shows what is on screen
    at k / output_fps. Frames are so repeated or dropped, never blended.

    Returns:
      (k, j - first) in order of k.
    """
    ratio = output_fps / source_fps
    return [
        (k, offset)
        for offset in range(count)
        for k in range(math.ceil((first + offset) * ratio), math.ceil((first + offset + 1) * ratio))
    ]


def frame_count(samples: int, rate: int, fps: Fraction) -> int:
    """Video frames of a sound of `samples` at `rate` Hz: the nearest number, at least one."""
    return max(1, round(Fraction(samples, rate) * fps))
