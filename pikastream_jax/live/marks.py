"""What is drawn into every picture: that it is generated, and, to measure latency, which one it is."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

LABEL = "AI generated"
_BITS = 24  # of a frame's number
_CELL = 8  # pixels of a bit


def label_mask(height: int, width: int, text: str = LABEL) -> UInt8[np.ndarray, "h w"]:
    """How opaque the label is, white on a dark ground, in the lower right corner; a twentieth of the picture's height."""
    font = ImageFont.load_default(max(9, height // 22))
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    draw.text((width - (right - left) - 4 - left, height - (bottom - top) - 4 - top), text, font=font, fill=255)
    return np.asarray(mask)


class Labeller:
    """Draws the label with a shadow, so that it reads on every ground."""

    def __init__(self, height: int, width: int):
        mask = label_mask(height, width).astype(np.float32) / 255
        shadow = np.roll(mask, (1, 1), axis=(0, 1))
        rows, columns = (np.flatnonzero((mask + shadow).any(axis=axis)) for axis in (1, 0))
        self._part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        self._mask, self._shadow = (0.85 * x[self._part][..., None] for x in (mask, shadow))

    def __call__(self, picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        picture = picture.copy()
        part = picture[self._part].astype(np.float32)
        part = part * (1 - self._shadow)
        picture[self._part] = np.round(part * (1 - self._mask) + 255 * self._mask).astype(np.uint8)
        return picture


def draw_number(picture: UInt8[np.ndarray, "h w 3"], number: int) -> UInt8[np.ndarray, "h w 3"]:
    """The number as squares along the upper edge, highest bit first, after one white and one black; for measuring."""
    picture = picture.copy()
    bits = [1, 0, *((number >> bit) & 1 for bit in reversed(range(_BITS)))]
    for place, bit in enumerate(bits):
        picture[:_CELL, place * _CELL : (place + 1) * _CELL] = 255 * bit
    return picture


def read_number(picture: UInt8[np.ndarray, "h w 3"]) -> int | None:
    """What `draw_number` drew, through a lossy codec; None where there is no number."""
    middle = picture[_CELL // 2, _CELL // 2 : _CELL * (_BITS + 2) : _CELL].mean(axis=-1)
    if len(middle) < _BITS + 2 or middle[0] < 128 or middle[1] >= 128:
        return None
    return int("".join("1" if value >= 128 else "0" for value in middle[2:]), 2)
