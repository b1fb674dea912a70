"""Log-mel spectra of 16 kHz speech, framed from the end so that nothing later than the given samples is used.

A latent frame of the video hears the samples before its own end. Framing from the end puts the last analysis window
exactly there, whatever the number of samples: the newest speech is never lost to a half-filled window, and a stream cut
anywhere gives the same frames as the whole recording.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pikastream_jax.config import AudioConfig

# Power is relative to a full-scale sine (0 dB), and POWER_FLOOR (-80 dB) is added before the logarithm, so that digital
# silence, dither and codec noise look nearly alike.
POWER_FLOOR = 1e-8
# Affine normalisation of decibels. Active speech at -23 dBFS, pauses left out, was measured over all bands of eight voices
# of the training corpus: means -53 to -58 dB, standard deviations 14 to 17 dB.
DECIBEL_MEAN = -55.0
DECIBEL_SCALE = 15.0
# Band edges of the filter bank, Hz: from below the lowest voice's pitch to just under the Nyquist frequency.
LOW_HZ, HIGH_HZ = 60.0, 7600.0


def hz_to_mel(frequency):
    """Hertz to mel, HTK formula (Young et al., The HTK Book, section 5.6)."""
    return 2595.0 * np.log10(1.0 + np.asarray(frequency, np.float64) / 700.0)


def mel_to_hz(mel):
    """Mel to hertz, inverse of `hz_to_mel`."""
    return 700.0 * (10.0 ** (np.asarray(mel, np.float64) / 2595.0) - 1.0)


def mel_centres(mels: int) -> np.ndarray:
    """Centre frequencies of the `mels` filters in Hz, float64 [mels]."""
    return mel_to_hz(np.linspace(hz_to_mel(LOW_HZ), hz_to_mel(HIGH_HZ), mels + 2))[1:-1]


@functools.lru_cache(maxsize=8)
def filter_bank(sample_rate: int, fft: int, mels: int) -> np.ndarray:
    """Triangular mel filters of unit peak, float32 [fft // 2 + 1, mels].

    Raises:
      ValueError: the filters reach beyond the Nyquist frequency, or one is so narrow that it holds no FFT bin.
    """
    if sample_rate < 2 * HIGH_HZ:
        raise ValueError(
            f"sample_rate={sample_rate} must be at least {2 * HIGH_HZ:.0f} Hz: the filters end at {HIGH_HZ:.0f} Hz"
        )
    edges = mel_to_hz(np.linspace(hz_to_mel(LOW_HZ), hz_to_mel(HIGH_HZ), mels + 2))
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    bins = np.arange(fft // 2 + 1)[:, None] * (sample_rate / fft)
    rising, falling = (bins - lower) / (centre - lower), (upper - bins) / (upper - centre)
    bank = np.maximum(0.0, np.minimum(rising, falling))
    if (empty := np.flatnonzero(bank.sum(axis=0) == 0)).size:
        raise ValueError(
            f"mels={mels} leaves filter {empty[0]} without an FFT bin: use fewer mels or more than fft={fft}"
        )
    return bank.astype(np.float32)


def frame_count(samples: int, cfg: AudioConfig) -> int:
    """Number of whole analysis windows in `samples` samples."""
    return 0 if samples < cfg.window else (samples - cfg.window) // cfg.hop + 1


def log_mel(samples: Float[Array, "*b n"], cfg: AudioConfig) -> Float[Array, "*b frames mels"]:
    """Normalised log-mel power of every window that lies wholly inside `samples`.

    Frames are aligned to the end: the last covers [n - window, n), the one j before it [n - window - j * hop, n - j * hop).
    There is no padding; up to hop - 1 of the oldest samples may be left over.

    Args:
      samples: mono audio at `cfg.sample_rate`, in [-1, 1].
      cfg: uses `sample_rate`, `window`, `hop`, `fft` and `mels`.

    Returns:
      `(10 log10(power + 1e-8) + 55) / 15`, oldest frame first, `frames = (n - window) // hop + 1`; 0 dB is the power of a
      full-scale sine. Digital silence is -5/3.

    Raises:
      ValueError: fewer samples than one window.
    """
    length = samples.shape[-1]
    frames = frame_count(length, cfg)
    if frames == 0:
        raise ValueError(
            f"log_mel got {length} samples; one window needs {cfg.window}: pass more audio or a smaller window"
        )
    # Newest frame last: starts are counted back from the end.
    starts = length - cfg.window - cfg.hop * np.arange(frames)[::-1]
    framed = samples[..., starts[:, None] + np.arange(cfg.window)]
    window = np.hanning(cfg.window + 1)[:-1]
    # A sine of amplitude 1 has |X| = sum(window) / 2 at its own frequency.
    gain = np.float32(2.0 / window.sum())
    spectrum = jnp.fft.rfft(framed * (window * gain).astype(np.float32), cfg.fft, axis=-1)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    # Highest precision: the default of a GPU would round powers to bfloat16 or TF32, 0.03 dB off and different per device.
    bands = jnp.matmul(power, filter_bank(cfg.sample_rate, cfg.fft, cfg.mels), precision="highest")
    return from_decibels(10.0 * jnp.log10(bands + POWER_FLOOR))


def to_decibels(mel: Float[Array, "*b mels"]) -> Float[Array, "*b mels"]:
    """Normalised log-mel to decibels relative to a full-scale sine."""
    return mel * DECIBEL_SCALE + DECIBEL_MEAN


def from_decibels(decibels: Float[Array, "*b mels"]) -> Float[Array, "*b mels"]:
    """Decibels relative to a full-scale sine to normalised log-mel."""
    return (decibels - DECIBEL_MEAN) / DECIBEL_SCALE
