"""Log-mel analysis against a float64 reference, and what it may and may not hear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.signal

from pikastream_jax.audio import mel
from pikastream_jax.config import AudioConfig

CFG = AudioConfig()


def reference(samples, cfg):
    """The definition, frame by frame in float64."""
    window = scipy.signal.get_window("hann", cfg.window)
    hertz = np.fft.rfftfreq(cfg.fft, 1 / cfg.sample_rate)
    edges = 700 * (10 ** (np.linspace(*(2595 * np.log10(1 + np.array([60, 7600]) / 700)), cfg.mels + 2) / 2595) - 1)
    rows = []
    stop = len(samples)
    while stop - cfg.window >= 0:
        frame = samples[stop - cfg.window : stop].astype(np.float64) * window
        power = np.abs(scipy.fft.rfft(frame, cfg.fft) / (window.sum() / 2)) ** 2
        bands = [power @ np.interp(hertz, edges[m : m + 3], [0, 1, 0]) for m in range(cfg.mels)]
        rows.append((10 * np.log10(np.array(bands) + 1e-8) + 55) / 15)
        stop -= cfg.hop
    return np.stack(rows[::-1])


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    time = np.arange(5000) / 16_000
    chirp = 0.3 * np.sin(2 * np.pi * (200 + 4000 * time) * time)
    return (chirp + 0.01 * rng.normal(size=time.size)).astype(np.float32)


def test_matches_float64_reference(samples):
    expected = reference(samples, CFG)
    found = np.asarray(mel.log_mel(samples, CFG))
    assert found.shape == expected.shape == ((5000 - 320) // 160 + 1, 64)
    assert found.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=0.003)


def test_full_scale_sine_is_zero_decibels():
    centre = mel.mel_centres(64)[30]
    tone = np.sin(2 * np.pi * centre * np.arange(3200) / 16_000).astype(np.float32)
    decibels = np.asarray(mel.to_decibels(mel.log_mel(tone, CFG)))
    assert decibels.argmax(-1).tolist() == [30] * len(decibels)
    # A band adds the bins of a window's main lobe, so the sum is a little over the peak.
    assert np.all(np.abs(decibels[:, 30]) < 3)


def test_silence_is_the_floor():
    np.testing.assert_allclose(mel.to_decibels(mel.log_mel(jnp.zeros(960), CFG)), -80, atol=1e-3)


def test_frames_are_aligned_to_the_end(samples):
    whole = mel.log_mel(samples, CFG)
    for cut in (1, 100, 333, 4000):
        part = mel.log_mel(samples[cut:], CFG)
        np.testing.assert_allclose(part, whole[-len(part) :], atol=1e-4)


def test_last_frame_hears_the_last_window_only(samples):
    changed = samples.copy()
    changed[:-320] += 0.1
    before, after = mel.log_mel(samples, CFG), mel.log_mel(changed, CFG)
    np.testing.assert_array_equal(before[-1], after[-1])
    assert np.abs(np.asarray(before[-2] - after[-2])).max() > 0.1


def test_frame_is_independent_of_later_samples(samples):
    """Frame j from the end hears nothing of the last j * hop samples."""
    changed = samples.copy()
    changed[-480:] = 0
    np.testing.assert_array_equal(mel.log_mel(samples, CFG)[:-3], mel.log_mel(changed, CFG)[:-3])


def test_batch_and_jit(samples):
    batch = np.stack([samples, samples[::-1]])
    found = jax.jit(lambda x: mel.log_mel(x, CFG))(batch)
    np.testing.assert_allclose(found[1], mel.log_mel(samples[::-1], CFG), atol=1e-4)


def test_slice_of_the_config_has_mel_frames():
    assert mel.frame_count(CFG.context_samples, CFG) == CFG.mel_frames


def test_errors_name_the_limit():
    with pytest.raises(ValueError, match="319 samples.*320"):
        mel.log_mel(np.zeros(319, np.float32), CFG)
    with pytest.raises(ValueError, match="mels=400"):
        mel.filter_bank(16_000, 512, 400)
    with pytest.raises(ValueError, match="sample_rate=8000"):
        mel.filter_bank(8000, 512, 64)


def test_every_filter_has_a_bin_and_unit_peak_at_most():
    bank = mel.filter_bank(16_000, 512, 64)
    assert bank.max() <= 1 and np.all(bank.max(axis=0) > 0.2)
