"""Sound and pictures for the tests, and a measurement of what was written: times of clicks and of flashes."""

import dataclasses
import io

import av
import numpy as np
import soundfile
from PIL import Image

CLICK_SECONDS = 0.01


def clicks(seconds: float, rate: int, channels: int = 1, first: float = 0.4, every: float = 1.0) -> np.ndarray:
    """Silence with short bursts of noise-free square wave at first, first + every, ... seconds: [n, channels]."""
    sound = np.zeros((round(seconds * rate), channels), np.float32)
    for start in np.arange(first, seconds, every):
        at, length = round(start * rate), round(CLICK_SECONDS * rate)
        burst = sound[at : at + length]
        burst[:] = 0.9 * np.sign(np.sin(2 * np.pi * 1000 * (np.arange(len(burst)) + 0.5) / rate))[:, None]
    return sound


def write_clicks(path, seconds: float = 3.0, rate: int = 16_000, **kwargs):
    soundfile.write(path, clicks(seconds, rate, **kwargs), rate)
    return path


def write_face(path, size=(256, 256), mode="RGB", **kwargs):
    """A picture that is not flat."""
    width, height = size
    ramp = np.add.outer(np.linspace(0, 255, height), np.linspace(0, 255, width)) / 2
    Image.fromarray(ramp.astype(np.uint8)).convert(mode).save(path, **kwargs)
    return path


@dataclasses.dataclass
class Played:
    """A stream as a player sees it; times are seconds after its first picture."""

    frames: np.ndarray  # [t, h, w, 3]
    times: list[float]  # of the frames
    flashes: list[float]
    clicks: list[float]
    sound_start: float
    sound_end: float
    codecs: set[str]


def play(source) -> Played:
    """Decodes a path, bytes, or an open PyAV container to its end."""
    container = source if isinstance(source, av.container.InputContainer) else None
    if container is None:
        container = av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source))
    pictures, times, blocks = [], [], []
    codecs = {stream.codec_context.name for stream in container.streams}
    for frame in container.decode():
        if frame.pts is None:  # over RTP, what comes before the first sender report
            continue
        time = float(frame.pts * frame.time_base)
        if isinstance(frame, av.VideoFrame):
            times.append(time)
            pictures.append(frame.to_ndarray(format="rgb24"))
        else:
            sound = frame.to_ndarray()
            if frame.format.is_packed:
                sound = sound.reshape(-1, frame.layout.nb_channels).T
            blocks.append((time, sound.mean(axis=0), frame.sample_rate))
    container.close()
    zero = times[0]
    times = [time - zero for time in times]
    heard = []
    for time, sound, rate in blocks:
        for at in np.flatnonzero(np.abs(sound) > 0.3):
            moment = time - zero + at / rate
            if not heard or moment - heard[-1][1] > 0.2:
                heard.append([moment, moment])
            heard[-1][1] = moment
    bright = [picture.mean() > 20 for picture in pictures]
    flashes = [t for t, now, before in zip(times, bright, [False, *bright], strict=False) if now and not before]
    return Played(
        frames=np.stack(pictures),
        times=times,
        flashes=flashes,
        clicks=[first for first, _ in heard],
        sound_start=blocks[0][0] - zero,
        sound_end=blocks[-1][0] + len(blocks[-1][1]) / blocks[-1][2] - zero,
        codecs=codecs,
    )
