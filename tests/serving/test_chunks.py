import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pikastream_jax.serving.chunks import MASTER_RATE, audio_chunks
from pikastream_jax.serving.resample import StreamResampler


@dataclasses.dataclass
class ArraySource:
    sound: np.ndarray  # [n, channels]
    rate: int
    block: int
    name: str = "array"
    live: bool = False

    @property
    def channels(self):
        return self.sound.shape[1]

    def blocks(self):
        for start in range(0, len(self.sound), self.block):
            yield self.sound[start : start + self.block]


def sine(seconds, rate, frequency=300.0):
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate).astype(np.float32)[:, None]


@pytest.mark.parametrize("rate_in", [8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 12_345])
@pytest.mark.parametrize("rate_out", [16_000, 48_000])
def test_resampling_neither_delays_nor_lengthens(rate_in, rate_out):
    sound = sine(0.5, rate_in)
    resampler = StreamResampler(rate_in, rate_out, 1)
    got, behind = [], 0.0
    for start in range(0, len(sound), 333):
        got.append(resampler.push(sound[start : start + 333]))
        behind = max(behind, min(start + 333, len(sound)) / rate_in - sum(map(len, got)) / rate_out)
    got = np.concatenate([*got, resampler.finish()])
    assert len(got) == round(len(sound) * rate_out / rate_in)
    assert behind <= 35 / min(rate_in, rate_out)  # what it holds back: about 2 ms at 16 kHz
    middle = slice(rate_out // 50, -rate_out // 50)  # the first and last 20 ms have no neighbours
    np.testing.assert_allclose(got[middle], sine(0.5, rate_out)[: len(got)][middle], atol=1e-3)


def test_resampling_keeps_channels_apart():
    sound = np.concatenate([sine(0.2, 16_000, 200), sine(0.2, 16_000, 500)], axis=1)
    resampler = StreamResampler(16_000, 48_000, 2)
    got = np.concatenate([resampler.push(sound), resampler.finish()])
    for channel, frequency in enumerate((200, 500)):
        expected = sine(0.2, 48_000, frequency)[:, 0]
        np.testing.assert_allclose(got[500:-500, channel], expected[500:-500], atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    samples=st.integers(1, 60_000),
    rate=st.sampled_from([8000, 16_000, 22_050, 44_100, 48_000]),
    channels=st.integers(1, 3),
    block=st.sampled_from([777, 8192, 50_000]),
)
def test_chunks_hold_all_the_sound_on_one_clock(samples, rate, channels, block):
    rng = np.random.default_rng(samples)
    source = ArraySource(rng.uniform(-0.5, 0.5, (samples, channels)).astype(np.float32), rate, block)
    chunks = list(audio_chunks(source, lambda index: 7680, 16_000))
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert all(chunk.speech.shape == (7680,) for chunk in chunks)
    assert all(chunk.master.shape == (23_040, min(channels, 2) if channels < 3 else 1) for chunk in chunks[:-1])
    assert not any(chunk.last for chunk in chunks[:-1])
    total = sum(len(chunk.master) for chunk in chunks)
    assert total == int(np.floor(samples * MASTER_RATE / rate + 0.5))
    # `last` is not known when the sound ends exactly with a chunk that has already gone.
    assert chunks[-1].last or len(chunks[-1].master) == 23_040


def test_chunk_bounds_follow_an_uneven_clock():
    """At 24 FPS four frames are 2,666.67 samples: chunk sizes alternate, and the sound sent keeps step."""
    ends = [round(4 * (n + 1) * 16_000 / 24) for n in range(10)]
    sizes = np.diff([0, *ends])
    source = ArraySource(sine(10 * 4 / 24, 16_000), 16_000, 1000)
    chunks = list(audio_chunks(source, lambda index: int(sizes[min(index, 9)]), 16_000))
    assert [len(chunk.speech) for chunk in chunks[:10]] == list(sizes)
    np.testing.assert_array_equal(np.cumsum([len(chunk.master) for chunk in chunks])[:9], np.asarray(ends[:9]) * 3)


def test_the_model_hears_the_mean_of_the_channels():
    sound = np.stack([np.full(7680, 0.5), np.full(7680, -0.1)], axis=1).astype(np.float32)
    (chunk,) = audio_chunks(ArraySource(sound, 16_000, 1000), lambda index: 7680, 16_000)
    np.testing.assert_allclose(chunk.speech, 0.2, atol=1e-6)
