"""The contact sheet: reference, sound and prompt, generated frames, and the mouth's opening, true and generated."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pikastream_jax.measuring.lipsync import CLOSED
from pikastream_jax.measuring.streams import Clip

_PICTURE, _CURVE, _TEXT, _GAP = 144, 110, 22, 10  # pixels: side of a picture, heights of the curves and a line of text
_TRUE, _MADE, _SOUND, _INK = (30, 90, 180), (220, 90, 30), (205, 208, 214), (40, 40, 44)


def save_sheet(path: Path, clips: Sequence[Clip]) -> None:
    """Writes one PNG, a block for each clip.

    Raises:
      ValueError: no clips.
    """
    if not clips:
        raise ValueError("a contact sheet of no clips: give at least one")
    width = _GAP + (1 + len(clips[0].frames)) * (_PICTURE + 4) + _GAP
    block = _TEXT + _PICTURE + 6 + _CURVE + 2 * _GAP
    sheet = Image.new("RGB", (width, block * len(clips) + _TEXT), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    pen.text((_GAP, 5), "mouth opening: true", fill=_TRUE, font=font)
    pen.text((_GAP + 150, 5), "generated", fill=_MADE, font=font)
    pen.text((_GAP + 230, 5), "grey: loudness of the speech; line: lips count as closed below it", fill=_INK, font=font)
    for row, clip in enumerate(clips):
        top = _TEXT + row * block
        pen.text((_GAP, top + 3), f"reference (person {clip.scene.seed})", fill=_INK, font=font)
        pen.text((_GAP + 2 * _PICTURE, top + 3), f'generated: "{clip.scene.prompt}"', fill=_INK, font=font)
        for column, picture in enumerate([clip.scene.reference, *clip.frames]):
            small = Image.fromarray(picture).resize((_PICTURE, _PICTURE), Image.Resampling.LANCZOS)
            sheet.paste(small, (_GAP + column * (_PICTURE + 4) + (_GAP if column else 0), top + _TEXT))
        area = (_GAP, top + _TEXT + _PICTURE + 6, width - _GAP, top + _TEXT + _PICTURE + 6 + _CURVE)
        _curves(pen, area, clip)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _curves(pen: ImageDraw.ImageDraw, area: tuple[int, int, int, int], clip: Clip) -> None:
    left, top, right, bottom = area
    audio, frames = clip.scene.audio, len(clip.scene.truth.opening)
    columns = np.array_split(audio, right - left)
    loud = np.sqrt([np.mean(column**2) for column in columns])
    loud = loud / max(float(loud.max()), 1e-6) * (bottom - top)
    for x, height in enumerate(loud):
        pen.line([(left + x, bottom), (left + x, bottom - float(height))], fill=_SOUND)
    pen.rectangle(area, outline=_SOUND)

    def place(frame: float, opening: float) -> tuple[float, float]:
        x = left + (frame + 0.5) / frames * (right - left)
        return x, bottom - float(np.clip(opening, 0.0, 1.0)) * (bottom - top)

    pen.line([(left, place(0, CLOSED)[1]), (right, place(0, CLOSED)[1])], fill=_INK)
    for curve, colour in ((clip.scene.truth.opening, _TRUE), (clip.reading.opening, _MADE)):
        pen.line([place(i, value) for i, value in enumerate(curve)], fill=colour, width=2)
