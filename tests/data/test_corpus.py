"""The corpus file, its grids, and augmentation against the same done to samples."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pikastream_jax.audio.mel import filter_bank, log_mel, mel_centres, to_decibels
from pikastream_jax.config import AudioConfig
from pikastream_jax.data import corpus, corpus_build, speech

CFG = AudioConfig()
FEATURES = Path(__file__).parents[2] / "data" / "speech_features.npz"
FOLDER = Path(__file__).parent / "speech"
LEAVES = corpus.TRACKS
_augment = jax.jit(corpus.augment)


@pytest.fixture(scope="module")
def samples():
    return speech.normalise_level(soundfile.read(FOLDER / "piper_joe.flac", dtype="float32")[0])


@pytest.fixture(scope="module")
def small(samples):
    """Four files of one voice and two of another, held out."""
    cuts = [samples[k * 40_000 : (k + 1) * 40_000] for k in range(6)]
    one = corpus_build.Voice("one", lambda: iter([(f"a{k}", x) for k, x in enumerate(cuts[:4])]), 1.0)
    two = corpus_build.Voice("two", lambda: iter([(f"b{k}", x) for k, x in enumerate(cuts[4:])]), 1.0, held_out=True)
    return corpus_build.build([one, two], seed=3)


def test_file_round_trip(small, tmp_path):
    corpus.save_corpus(tmp_path / "c.npz", small)
    found = corpus.load_corpus(tmp_path / "c.npz")
    for field in dataclasses.fields(corpus.Corpus):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(small, field.name))


def test_build_is_deterministic_and_keeps_voices_apart(small):
    assert small.voice.tolist() == ["one"] * (len(small.voice) - 1) + ["two"]
    assert small.split[-1] == "held_out" and "held_out" not in small.split[:-1]
    assert np.array_equal(small.start[1:], small.stop[:-1]) and small.start[0] == 0
    assert len(small.file_name) == 6


def test_mel_frames_end_with_latent_frames(samples):
    """What latent frame n hears in the corpus is what streaming computes from the samples before its end."""
    clean = samples[: 2560 * 20]
    mel, _ = corpus_build.features(clean, np.zeros_like(clean))
    assert len(mel) == 16 * 20
    for n in (6, 13, 19):
        end = 2560 * (n + 1)
        heard = log_mel(clean[end - CFG.context_samples : end], CFG)
        stored = corpus.dequantise_mel(jnp.asarray(mel[16 * (n + 1) - CFG.mel_frames : 16 * (n + 1)]))
        np.testing.assert_allclose(to_decibels(stored), to_decibels(heard), atol=0.41)


def test_window_and_slices(small):
    starts = small.starts("held_out", 5, CFG.mel_frames)
    assert starts.min() == small.start[-1] + 5 and starts.max() == small.stop[-1] - 5
    start = int(starts[2])
    mel, track = jax.jit(corpus.window, static_argnums=(3, 4))(small.mel, small.tracks, start, 5, CFG.mel_frames)
    assert mel.shape == (16 * 5 + 80, 64) and track.mouth_open.shape == (20,)
    np.testing.assert_allclose(track.mouth_open, small.tracks[4 * start : 4 * start + 20, 0] / 255, atol=1e-6)
    slices = corpus.audio_slices(mel, 5, CFG.mel_frames)
    for n in range(5):
        stop = 16 * (start + n + 1)
        expected = corpus.dequantise_mel(jnp.asarray(small.mel[stop - CFG.mel_frames : stop]))
        np.testing.assert_allclose(slices[n], expected, atol=1e-6)


def test_quantisation_error(samples):
    mel = log_mel(samples[:32_000], CFG)
    error = to_decibels(corpus.dequantise_mel(jnp.asarray(corpus.quantise_mel(np.asarray(mel))))) - to_decibels(mel)
    assert np.abs(error).max() <= corpus.MEL_STEP / 2 + 1e-3
    track = speech.mouth_tracks(samples, 25)
    found = corpus.dequantise_tracks(jnp.asarray(corpus.quantise_tracks(track)))
    for name in LEAVES:
        np.testing.assert_allclose(getattr(found, name), getattr(track, name), atol=1 / 250)


def test_silence_and_speech_are_where_the_index_says(small):
    loud = np.asarray(corpus.dequantise_mel(jnp.asarray(small.mel))).mean(1).reshape(-1, 4).mean(1)
    inside = np.zeros(len(small.tracks), bool)
    for start, stop in zip(small.file_start, small.file_stop, strict=True):
        inside[start:stop] = True
    assert loud[inside].mean() > loud[~inside].mean() + 0.5
    assert small.tracks[~inside, 0].mean() < 20 < small.tracks[inside, 0].mean()


CHANNEL = {"gain": 0.0, "noise": -120.0, "slope": 0.0, "low_hz": 1.0, "high_hz": 1e5}


def degraded(mel, **settings):
    channel = corpus.Channel(**{k: jnp.float32(v) for k, v in {**CHANNEL, **settings}.items()})
    return np.asarray(to_decibels(corpus.degrade(mel, channel, jax.random.key(0))))


def test_gain_and_band_match_the_waveform(samples):
    filtered = scipy.signal.sosfilt(scipy.signal.butter(2, 300, "high", fs=16_000, output="sos"), samples)
    filtered = scipy.signal.sosfilt(scipy.signal.butter(8, 3400, "low", fs=16_000, output="sos"), filtered) / 2
    truth = np.asarray(to_decibels(log_mel(filtered.astype(np.float32), CFG)))
    clean = log_mel(samples, CFG)
    found = degraded(clean, gain=-20 * np.log10(2), low_hz=300.0, high_hz=3400.0)
    spoken = (np.asarray(to_decibels(clean)) > -55) & (truth > -60)
    centres = mel_centres(64)
    inside = spoken & (centres > 350) & (centres < 3200)
    outside = spoken & ~((centres > 350) & (centres < 3200))
    print(
        f"band: {np.abs(found - truth)[inside].mean():.2f} dB inside, {np.abs(found - truth)[outside].mean():.2f} outside"
    )
    assert np.abs(found - truth)[inside].mean() < 0.5
    assert np.abs(found - truth)[outside].mean() < 2  # the filter's phase smears what its edge cuts


def test_noise_matches_the_waveform(samples):
    rng = np.random.default_rng(0)
    clean = log_mel(samples, CFG)
    for slope, level in ((0.0, -50.0), (3.0, -45.0)):
        spectrum = np.fft.rfft(rng.normal(size=len(samples)))
        hertz = np.maximum(np.fft.rfftfreq(len(samples), 1 / 16_000), 60)
        noise = np.fft.irfft(spectrum * hertz ** (-slope / 20 / np.log10(2)), len(samples))
        noise *= 10 ** (level / 20) / noise.std()
        truth = np.asarray(to_decibels(log_mel((samples + noise).astype(np.float32), CFG)))
        found = degraded(clean, noise=level, slope=slope)
        spoken = np.asarray(to_decibels(clean)) > -55
        # In speech the mean over time of each band; in pauses the noise itself, in mean and in scatter.
        bands = np.array([(found - truth)[spoken[:, m], m].mean() for m in range(64) if spoken[:, m].sum() > 50])
        pause = np.asarray(to_decibels(clean)).max(1) < -75
        print(
            f"noise: worst band {np.abs(bands).max():.2f} dB, pauses {np.abs((found - truth)[pause].mean(0)).max():.2f} dB"
        )
        assert np.abs(bands).max() < 1
        assert np.abs((found - truth)[pause].mean(0)).max() < 2
        np.testing.assert_allclose(found[pause].std(0).mean(), truth[pause].std(0).mean(), rtol=0.25)


def test_augment_is_pure_and_varied(samples):
    mel = log_mel(samples[:32_000], CFG)
    keys = jax.random.split(jax.random.key(1), 16)
    batch = jax.jit(jax.vmap(lambda k: corpus.augment(mel, k)))(keys)
    assert np.isfinite(batch).all() and np.asarray(batch).std(0).mean() > 0.1
    np.testing.assert_allclose(batch[3], corpus.augment(mel, keys[3]), atol=1e-3)


def test_a_single_row_without_an_upper_edge_is_finite(samples):
    mel = log_mel(samples[:32_000], CFG)
    one = jax.jit(lambda edge: corpus.band_gain(64, jnp.float32(1.0), edge))(jnp.float32(1e5))
    np.testing.assert_allclose(one, 1.0, atol=1e-4)
    augment = jax.jit(jax.vmap(lambda k: corpus.augment(mel, k)))
    assert all(np.isfinite(augment(jax.random.split(jax.random.key(n), 1))).all() for n in range(12))


def test_noise_power_of_white_noise():
    rng = np.random.default_rng(5)
    white = rng.normal(0, 1, 16_000 * 4).astype(np.float32)
    power = 10 ** (np.asarray(to_decibels(log_mel(white, CFG))) / 10)
    np.testing.assert_allclose(power.mean(0), corpus.noise_power(jnp.float32(0), CFG), rtol=0.2)
    assert filter_bank(16_000, 512, 64).shape == (257, 64)


def test_errors(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="pikastream_jax.data.corpus"):
        corpus.load_corpus(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", a=1)
    with pytest.raises(ValueError, match="format 2"):
        corpus.load_corpus(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="'test'"):
        small.starts("test", 5, 96)
    with pytest.raises(ValueError, match="100000 latent frames"):
        small.starts("held_out", 100_000, 96)
    with pytest.raises(ValueError, match="mel frames"):
        dataclasses.replace(small, mel=small.mel[:-1])


@pytest.mark.skipif(not FEATURES.exists(), reason="speech features not built")
def test_shipped_features():
    found = corpus.load_corpus(FEATURES)
    assert FEATURES.stat().st_size <= 16 * 2**20
    assert 40 <= found.minutes <= 65
    held = set(found.voice[found.split == "held_out"])
    assert held and not held & set(found.voice[found.split != "held_out"])
    assert set(found.split) == set(corpus.SPLITS)
    names = [
        f"{v}/{n}"
        for v, n in zip(found.voice[np.searchsorted(found.stop * 4, found.file_stop)], found.file_name, strict=True)
    ]
    assert len(set(names)) == len(names)  # no file in two splits
    speaking = found.tracks[:, LEAVES.index("activity")] > 200
    assert 0.6 < speaking.mean() < 0.95
    opening = found.tracks[speaking, 0] / 255
    assert 0.2 < opening.mean() < 0.5 and 0.08 < (opening < 0.08).mean() < 0.35


def test_the_own_voice_stays_as_it_is():
    mel = np.random.default_rng(0).normal(size=(20, CFG.mels)).astype(np.float32)
    np.testing.assert_allclose(corpus.other_voice(mel, jnp.float32(1.0), CFG), mel, atol=1e-4)


@settings(deadline=None)  # the first example compiles
@given(factor=st.floats(0.8, 1.25), hertz=st.floats(0, 8000))
def test_the_warp_keeps_order_ends_and_inverse(factor, hertz):
    warp = lambda f, a: float(corpus.warped_hertz(jnp.float32(f), jnp.float32(a), 8000.0))  # noqa: E731
    assert warp(0, factor) == pytest.approx(0, abs=1e-3) and warp(8000, factor) == pytest.approx(8000, rel=1e-5)
    assert warp(min(hertz + 50, 8000), factor) >= warp(hertz, factor)
    if hertz < 3800:
        assert warp(hertz, factor) == pytest.approx(factor * hertz, rel=1e-5)
    assert warp(warp(hertz, factor), 1 / factor) == pytest.approx(hertz, rel=1e-4, abs=1e-2)


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.15, 1.25])
def test_another_voice_has_its_resonances_where_the_warp_takes_them(factor):
    """Noise through two resonances, made with them as they are and with them moved: the spectrum of the one, warped, is that of the other."""
    noise = np.random.default_rng(1).normal(size=4 * 16_000)

    def spoken(multiplied):
        found = noise
        for hertz, width in ((700 * multiplied, 120), (1900 * multiplied, 200)):
            radius, angle = np.exp(-np.pi * width / 16_000), 2 * np.pi * hertz / 16_000
            found = scipy.signal.lfilter([1.0], [1.0, -2 * radius * np.cos(angle), radius**2], found)
        return np.asarray(log_mel(jnp.asarray(0.1 * found / found.std(), jnp.float32), CFG)).mean(axis=0)

    own, other = spoken(1.0), spoken(factor)
    warped = np.asarray(corpus.other_voice(own[None], jnp.float32(factor), CFG))[0]
    low = mel_centres(CFG.mels) < 3500  # beyond it is noise alone
    apart = lambda a, b: np.std((a - b)[low])  # noqa: E731 (a level is no shape)
    assert apart(warped, other) < 0.4 * apart(own, other)
    peak = lambda mel: mel_centres(CFG.mels)[np.argmax(mel)]  # noqa: E731
    assert peak(warped) == pytest.approx(factor * peak(own), rel=0.08)


@pytest.mark.parametrize("hertz", [1000, 2000, 5000])
@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_tone_goes_where_the_warp_takes_it(hertz, factor):
    """Below the bend and beyond it: a tone, warped, peaks in the filter in which a tone of the warped frequency does."""
    bend = 4800 * min(factor, 1.0)
    moved = np.interp(hertz, [0, bend / factor, 8000], [0, bend, 8000])
    tone = lambda f: log_mel(jnp.asarray(0.1 * np.sin(2 * np.pi * f * np.arange(3200) / 16_000), jnp.float32), CFG)  # noqa: E731
    warped = corpus.other_voice(tone(hertz), jnp.float32(factor), CFG)
    expected = np.argmax(tone(moved).mean(0))
    assert abs(np.argmax(warped.mean(0)) - expected) <= 1
    assert abs(np.argmax(tone(hertz).mean(0)) - expected) > 2, "the filters would not tell it from one that stayed"


@settings(deadline=None)
@given(factor=st.floats(0.8, 1.25), seed=st.integers(0, 2**31 - 1))
def test_another_voice_stays_within_the_levels_of_its_frames(factor, seed):
    mel = np.random.default_rng(seed).uniform(-5 / 3, 11 / 3, (4, CFG.mels)).astype(np.float32)  # -80 to 0 dB
    found = np.asarray(corpus.other_voice(mel, jnp.float32(factor), CFG))
    assert found.dtype == np.float32 and np.isfinite(found).all()
    assert (found.min(1) >= mel.min(1) - 1e-5).all() and (found.max(1) <= mel.max(1) + 1e-5).all()


@settings(deadline=None)  # the first example compiles
@given(seed=st.integers(0, 2**31 - 1))
def test_augmented_sound_stays_within_the_range_of_levels(seed):
    """Nothing below the floor of -80 dB, nothing louder than the speech at +6 dB and the noise at its worst together."""
    mel = np.random.default_rng(seed).uniform(-5 / 3, 11 / 3, (4, CFG.mels)).astype(np.float32)
    found = np.asarray(to_decibels(_augment(mel, jax.random.key(seed))))
    assert np.isfinite(found).all() and found.min() >= -80.01 and found.max() < 6.5


def test_silence_has_no_other_voice():
    silence = log_mel(jnp.zeros(16_000), CFG)
    np.testing.assert_allclose(corpus.other_voice(silence, jnp.float32(1.2), CFG), silence, atol=1e-5)


def test_seven_voices_in_ten_are_others():
    factors = np.asarray(jax.vmap(corpus.sample_voice)(jax.random.split(jax.random.key(0), 4000)))
    assert np.mean(factors == 1.0) == pytest.approx(0.3, abs=0.03)
    others = factors[factors != 1.0]
    assert others.min() >= 0.8 - 1e-6 and others.max() <= 1.25 + 1e-6
    assert np.mean(others > 1) == pytest.approx(0.5, abs=0.04)
