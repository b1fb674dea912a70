import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pikastream_jax.live.voice import Voice, VoiceFull

SIZE = 2560  # samples of a chunk at 16 kHz, 7680 at 48 kHz


def tone(seconds, rate, hertz=300.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def test_silence_until_there_is_a_whole_chunk_or_the_end():
    voice = Voice(16_000)
    voice.push(tone(0.1, 16_000), 16_000)
    assert voice.take(SIZE).spoken == 0, "a word is not cut up"
    voice.push(tone(0.1, 16_000), 16_000)
    said = voice.take(SIZE)
    assert said.spoken == 7680 and not said.ends
    assert voice.take(SIZE).spoken == 0
    voice.end()
    said = voice.take(SIZE)
    assert said.spoken == 9600 - 7680 and said.ends and not said.sound[said.spoken :].any()
    assert voice.seconds == 0.0


@settings(max_examples=20, deadline=None)
@given(rate=st.sampled_from([8_000, 16_000, 22_050, 24_000, 44_100, 48_000]), cuts=st.lists(st.integers(1, 9_000), min_size=1, max_size=6))
def test_nothing_is_lost_and_both_copies_stay_together(rate, cuts):
    voice, whole = Voice(16_000), tone(sum(cuts) / rate, rate)
    for begin, size in zip(np.cumsum([0, *cuts[:-1]]), cuts, strict=True):
        voice.push(whole[begin : begin + size], rate)
    voice.end()
    taken = []
    while not taken or not taken[-1].ends:
        taken.append(voice.take(SIZE))
    assert sum(said.spoken for said in taken) == (len(whole) * 48_000 * 2 + rate) // (2 * rate)
    taken += [voice.take(SIZE)]
    sound, speech = (np.concatenate([getattr(said, name) for said in taken]) for name in ("sound", "speech"))
    length = len(whole) * 16_000 // rate
    if length > 2_000:  # away from the edges, where a tone that begins at once is no tone of 300 Hz
        early = sound[::3][500 : length - 500]
        # The model's copy may be 2 ms late.
        assert min(np.abs(early - speech[500 + delay : length - 500 + delay]).max() for delay in range(33)) < 0.02


def test_cleared_speech_is_gone_and_a_new_utterance_may_have_another_rate():
    voice = Voice(16_000)
    voice.push(tone(1.0, 24_000), 24_000)
    with pytest.raises(ValueError, match="began with 24000 Hz and goes on with 16000 Hz: end it first"):
        voice.push(tone(0.1, 16_000), 16_000)
    assert voice.clear() == pytest.approx(1.0, abs=0.01)
    assert voice.take(SIZE).spoken == 0
    voice.push(tone(0.2, 16_000), 16_000)
    assert voice.take(SIZE).spoken == 7680


def test_what_cannot_be_said():
    voice = Voice(16_000, limit=1.0)
    with pytest.raises(ValueError, match="sound of 4000 Hz cannot be used: send 8000 to 192000 Hz"):
        voice.push(tone(0.1, 4_000), 4_000)
    with pytest.raises(ValueError, match="no numbers"):
        voice.push(np.array([0.0, np.nan], np.float32), 16_000)
    voice.push(tone(0.9, 16_000), 16_000)
    with pytest.raises(VoiceFull, match="the limit is 1 s"):
        voice.push(tone(0.2, 16_000), 16_000)
    with pytest.raises(ValueError, match="44100 Hz cannot be fed from 48000"):
        Voice(44_100)
