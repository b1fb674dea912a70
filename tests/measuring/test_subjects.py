import numpy as np
import pytest
import soundfile

from pikastream_jax.data.speech import ACTIVE_LEVEL, active_level
from pikastream_jax.measuring import subjects


def test_shipped_speech_is_read_at_the_analysis_level():
    speech = subjects.read_speech(subjects.SPEECH)
    assert len(speech) == pytest.approx(10.02 * 16_000, abs=200)
    assert active_level(speech) == pytest.approx(ACTIVE_LEVEL, abs=0.1)


def test_other_rates_and_channels_give_the_same_curves(tmp_path):
    import scipy.signal

    speech = subjects.read_speech(subjects.SPEECH)
    other = scipy.signal.resample_poly(speech, 441, 160)
    soundfile.write(tmp_path / "stereo.wav", np.stack([other, other], axis=1), 44_100)
    again = subjects.read_speech(tmp_path / "stereo.wav")
    a, b = (subjects.true_curves(subjects.person(0), x).opening for x in (speech, again))
    assert np.corrcoef(a[:250], b[:250])[0, 1] > 0.99


def test_what_is_no_speech_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.wav"):
        subjects.read_speech(tmp_path / "gone.wav")
    (tmp_path / "text.wav").write_text("not sound")
    with pytest.raises(ValueError, match="WAV, FLAC or OGG"):
        subjects.read_speech(tmp_path / "text.wav")
    soundfile.write(tmp_path / "short.wav", np.zeros(16_000), 16_000)
    with pytest.raises(ValueError, match="at least 2 s"):
        subjects.read_speech(tmp_path / "short.wav")


def test_excerpts_differ_and_wrap_around():
    speech = [np.arange(100.0), np.arange(1000.0, 1100.0)]
    pieces = [subjects.excerpt(speech, index, 150) for index in range(6)]
    assert all(len(piece) == 150 for piece in pieces)
    assert {int(piece.min() >= 1000) for piece in pieces[1::2]} == {1}  # files in turn
    assert len({piece[0] for piece in pieces}) == 6
    assert (np.diff(pieces[0]) % 100 == 1).all()


def test_a_person_is_the_seed_and_nothing_else():
    first, again, other = (subjects.draw(subjects.person(seed), subjects.portrait_state(seed)) for seed in (5, 5, 6))
    assert (first == again).all()
    assert np.abs(first.astype(int) - other).mean() > 10


def test_an_unknown_prompt_has_no_true_motion():
    track = subjects.true_curves(subjects.person(0), np.zeros(16_000, np.float32)).track
    with pytest.raises(ValueError, match="no known motion"):
        subjects.true_motion(0, "a person flying", track)
