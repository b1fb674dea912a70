"""Mouth motion from recorded speech by causal signal analysis: loudness and formant bands, no future sound.

The measures follow articulatory phonetics (Stevens, Acoustic Phonetics, 1998):
- the jaw's opening raises the first formant, so opening grows with the energy at 300-1200 Hz and with how high it lies;
- spread lips raise the second formant (i, e, s), rounded lips lower it (o, u, w);
- p and b stop the sound in every band, after the second formant has fallen; t, d, k and g stop it too, but the formant stays
  high or rises, so those keep the lips apart;
- m leaves only a murmur below 400 Hz, n also a resonance near 2 kHz.

Thresholds are absolute, so the level must be that of `normalise_level`. Every value depends on at most the last 0.9 s.
Delay: opening and width lag the sound by about 25 ms (half of a 20 ms analysis window and of a 30 ms mean; measured on
a voice switched on and off: `tests/data/test_speech.py`), activity rises within 60 ms, excitement looks back over 0.5 s.
"""

import numpy as np
from jaxtyping import Float
from scipy.ndimage import maximum_filter1d
from scipy.signal import lfilter

from pikastream_jax.data.motion import SpeechTrack

SAMPLE_RATE = 16_000
ACTIVE_LEVEL = -23.0  # dBFS of active speech after `normalise_level`
HOP, WINDOW, FFT = 80, 320, 512  # 5 ms steps, 20 ms Hann windows
FLOOR = 1e-8
PLACE = 0.0  # dB; above it a stop is made with the tongue, see `_apart`
OPENING_SPEED = 15.0  # 1 / s: lips part in 70 ms at the fastest, so 0.6 in a frame at 25 FPS; they close at once
# Hz. Named for what they tell; `power` of a band is relative to a full-scale sine.
BANDS = {
    "low": (60, 400),
    "first": (300, 1200),
    "close": (270, 520),
    "wide": (600, 1200),
    "back": (700, 1400),
    "front": (1500, 2300),
    "spread": (1800, 3000),
    "middle": (500, 3000),
    "hush": (1800, 3500),
    "hiss": (3500, 7600),
    "all": (60, 7600),
}


def active_level(samples: Float[np.ndarray, " n"]) -> float:
    """Level of active speech in dBFS (0 dB: mean square 1): mean power over 20 ms frames, pauses gated out.

    Two gates as in ITU-R BS.1770: -70 dBFS, then 15 dB below the mean of what passed. `-inf` when nothing passes.
    """
    frames = samples[: len(samples) // WINDOW * WINDOW].reshape(-1, WINDOW).astype(np.float64)
    power = np.mean(frames**2, axis=1)
    for gate in (lambda p: 1e-7, lambda p: p.mean() * 10**-1.5):
        power = power[power > gate(power)] if power.size else power
    return float(10 * np.log10(power.mean())) if power.size else -np.inf


def normalise_level(samples: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Speech of one file scaled to an active level of -23 dBFS, float32; silence is returned as it is."""
    level = active_level(samples)
    gain = 1.0 if np.isinf(level) else 10 ** ((ACTIVE_LEVEL - level) / 20)
    return (samples * gain).astype(np.float32)


def band_levels(samples: Float[np.ndarray, " n"]) -> dict[str, Float[np.ndarray, " k"]]:
    """Level of each of `BANDS` in dB every 5 ms; entry k hears samples before (k + 1) * 80 only."""
    steps = len(samples) // HOP
    padded = np.concatenate([np.zeros(WINDOW - HOP, np.float32), samples[: steps * HOP].astype(np.float32)])
    window = np.hanning(WINDOW + 1)[:-1]
    window = (window * 2 / window.sum()).astype(np.float32)
    frequency = np.arange(FFT // 2 + 1) * SAMPLE_RATE / FFT
    selector = np.stack([(frequency >= low) & (frequency < high) for low, high in BANDS.values()], 1).astype(np.float32)
    levels = np.empty((steps, len(BANDS)), np.float32)
    block = 4096  # bounds memory on long recordings
    for start in range(0, steps, block):
        stop = min(start + block, steps)
        framed = np.lib.stride_tricks.sliding_window_view(padded[start * HOP : (stop - 1) * HOP + WINDOW], WINDOW)[
            ::HOP
        ]
        levels[start:stop] = np.abs(np.fft.rfft(framed * window, FFT)) ** 2 @ selector
    return dict(zip(BANDS, 10 * np.log10(levels.T + FLOOR), strict=True))


def _ramp(value, low, high):
    return np.clip((value - low) / (high - low), 0.0, 1.0)


def _lagged(value, steps):
    return np.concatenate([np.repeat(value[:1], steps), value[:-steps]]) if len(value) > steps else value


def _apart(levels, loudness):
    """1 while a dip of loudness is a consonant made behind the lips (t, d, k, g), 0 otherwise; at most 120 ms long."""
    tilt = levels["front"] - levels["back"]
    place = (levels["front"] - levels["first"]) + tilt + (_lagged(tilt, 2) - _lagged(tilt, 12))
    # A hiss is no stop: it keeps the lips apart by itself, and what follows it (sp, st) tells nothing of its place.
    onset = (loudness < 0.25) & (_lagged(loudness, 1) >= 0.25) & (levels["hiss"] < levels["first"] + 6.0)
    apart = np.zeros(len(loudness), np.float32)
    for k in np.flatnonzero(onset):
        # Two steps more: the tail of the formants says most where the tongue goes.
        if place[min(k + 1, len(place) - 1)] > PLACE:
            end = min(k + 24, len(apart))
            reopened = np.flatnonzero(loudness[k:end] > 0.4)
            apart[k + 1 : k + reopened[0] if reopened.size else end] = 1.0
    return apart


def _mouth(levels):
    """Opening, width and tongue every 5 ms, unsmoothed."""
    loudness = _ramp(levels["first"], -44.0, -16.0)
    height = _ramp(levels["wide"] - levels["close"], -12.0, 5.0)
    hiss = _ramp(levels["hiss"], -50.0, -34.0) * (levels["hiss"] > levels["first"])
    # m: a strong low band over a weak first formant region, and nothing of the resonance that n has near 2 kHz.
    murmur = _ramp(levels["low"] - levels["first"], 3.0, 6.0) * _ramp(levels["low"], -48.0, -40.0)
    murmur = murmur * _ramp(-levels["first"], 24.0, 29.0) * _ramp(levels["first"] - levels["front"], 12.0, 19.0)
    # ... and a fall from the vowel before, if there was one: some voices have as steep a spectrum in close vowels.
    vowel = maximum_filter1d(levels["first"], 50, origin=24)
    murmur = murmur * np.maximum(_ramp(vowel - levels["first"], 7.0, 10.0), _ramp(-vowel, 28.0, 31.0))
    apart = _apart(levels, loudness)
    # However weak, a vowel keeps the lips apart (0.13): only a stop, a murmur or a pause closes them.
    opening = np.maximum(loudness * (0.4 + 0.6 * height), 0.13 * _ramp(levels["first"], -47.0, -41.0)) * (1.0 - murmur)
    opening = np.maximum(opening, np.maximum(0.16 * hiss, 0.15 * apart))

    fronted = np.tanh((levels["spread"] - levels["back"] + 8.0) / 12.0)
    vowel = np.where(fronted < 0, fronted * (1.0 - 0.8 * height), fronted) * loudness
    sibilant = np.where(levels["hiss"] > levels["hush"] + 2.0, 0.6, -0.4)
    width = np.where(levels["hiss"] > levels["first"], hiss * sibilant, vowel)

    breathy = _ramp(levels["hiss"], -60.0, -52.0) * _ramp(-levels["hiss"], 36.0, 44.0) * (levels["first"] < -34.0)
    tongue = np.maximum(0.7 * apart, 0.5 * breathy) * (loudness < 0.6)
    return opening, width, tongue


def _pitch_spread(samples, steps):
    """Spread of the pitch over the last 0.5 s in semitones (standard deviation of voiced frames), every 5 ms."""
    span, hop = 640, 320  # 40 ms frames every 20 ms
    count = max(0, (len(samples) - span) // hop + 1)
    track = np.full(steps, 0.0, np.float32)
    if count < 2:
        return track
    frames = np.lib.stride_tricks.sliding_window_view(samples, span)[::hop][:count]
    window = np.hanning(span).astype(np.float32)
    # The autocorrelation of the window itself tilts the curve towards short lags: divided out.
    bias = np.fft.irfft(np.abs(np.fft.rfft(window, 2048)) ** 2)
    best, voiced = np.empty(count, int), np.empty(count, bool)
    for start in range(0, count, 1024):  # bounds memory on long recordings
        power = np.abs(np.fft.rfft(frames[start : start + 1024] * window, 2048)) ** 2
        correlation = np.fft.irfft(power)
        curve = correlation[:, 40:230] / bias[40:230]  # 400 .. 70 Hz
        best[start : start + 1024] = curve.argmax(axis=1)
        voiced[start : start + 1024] = curve.max(axis=1) > 0.5 * (correlation[:, 0] / bias[0] + FLOOR)
    semitones = 12 * np.log2(SAMPLE_RATE / (best + 40.0))
    kernel = np.ones(24)  # 24 frames of 20 ms and one of 40 ms: 0.5 s
    weight, first, second = (lfilter(kernel, 1, voiced * v) for v in (1.0, semitones, semitones**2))
    mean = first / np.maximum(weight, 1)
    spread = np.sqrt(np.maximum(second / np.maximum(weight, 1) - mean**2, 0)) * (weight >= 6)
    ends = (span + hop * np.arange(count)) // HOP - 1  # last 5 ms step each frame may serve
    index = np.searchsorted(ends, np.arange(steps), side="right") - 1
    return np.where(index >= 0, spread[np.maximum(index, 0)], 0.0)


def _excitement(samples, levels):
    """0..1 every 5 ms from loudness, vocal effort (spectral tilt) and pitch movement over the last 0.5 s."""
    active = (levels["all"] > -40.0).astype(np.float64)
    kernel = np.ones(100)
    weight = np.maximum(lfilter(kernel, 1, active), 1)
    loudness = lfilter(kernel, 1, active * levels["all"]) / weight
    effort = lfilter(kernel, 1, active * (levels["middle"] - levels["low"])) / weight
    lively = 0.5 * _ramp(loudness, -22.0, -12.0) + 0.3 * _ramp(effort, -2.0, 10.0)
    lively = lively + 0.35 * _ramp(_pitch_spread(samples, len(active)), 1.5, 5.0)
    return np.clip(lively, 0, 1) * _ramp(weight, 10, 40)


def mouth_tracks(samples: Float[np.ndarray, " n"], fps: float) -> SpeechTrack:
    """Motion of the mouth that goes with speech, one value per video frame.

    Args:
      samples: 16 kHz mono speech at the level of `normalise_level`.
      fps: video frames per second, at most 100.

    Returns:
      Tracks of `T = floor(n * fps / 16000)` float32 values. Frame i depends on samples before its end, (i + 1) / fps,
      and on none older than 0.9 s before it. `mouth_open` is under 0.08 in pauses and where lips close.

    Raises:
      ValueError: `samples` is not one-dimensional, or `fps` is out of range.
    """
    if samples.ndim != 1:
        raise ValueError(f"mouth_tracks got samples of shape {samples.shape}; pass mono speech of shape [n]")
    if not 0 < fps <= 100:
        raise ValueError(f"fps={fps} must lie in (0, 100]: the analysis steps are 5 ms and two of them make a frame")
    frames = int(np.floor(len(samples) * fps / SAMPLE_RATE + 1e-9))
    if frames == 0:
        return SpeechTrack(*(np.zeros(0, np.float32) for _ in range(5)))
    levels = band_levels(samples)
    opening, width, tongue = _mouth(levels)
    voice = _ramp(levels["all"], -52.0, -42.0)
    rising, falling = lfilter([0.08], [1, -0.92], voice), lfilter([0.02], [1, -0.98], voice)
    excitement = _excitement(samples, levels)

    # Steps that end by the end of frame i: floor, so that a frame never hears past itself.
    ends = np.floor((np.arange(frames) + 1) * SAMPLE_RATE / fps / HOP + 1e-9).astype(int)
    period = max(2, int(np.floor(SAMPLE_RATE / fps / HOP)))

    def recent(values, steps, reduce):
        padded = np.concatenate([np.repeat(values[:1], steps), values])
        view = np.lib.stride_tricks.sliding_window_view(padded, steps)
        return reduce(view[ends], axis=1)

    mean_open = recent(opening, 6, np.mean)
    # Lips that were together for 20 ms of the frame are drawn together, or closures of 60 ms would blur away.
    closed = recent((opening < 0.06).astype(np.float32), period, np.sum) >= min(4, period)
    mouth_open = np.where(closed, np.minimum(mean_open, 0.04), mean_open)
    for i in range(1, frames):
        mouth_open[i] = min(mouth_open[i], mouth_open[i - 1] + OPENING_SPEED / fps)
    speaking = np.maximum(rising, falling)
    leaves = {
        "mouth_open": mouth_open,
        "mouth_width": recent(width, 6, np.mean),
        "tongue": recent(tongue, 6, np.mean),
        "activity": recent(speaking, 1, np.mean),
        "excitement": recent(excitement, 1, np.mean),
    }
    low = {"mouth_width": -1.0}
    return SpeechTrack(**{k: np.clip(v, low.get(k, 0.0), 1.0).astype(np.float32) for k, v in leaves.items()})
