import os
import struct

import av
import numpy as np
import pytest
import soundfile
from media import clicks

from pikastream_jax.serving.audio_in import checked_blocks, open_audio, open_pcm_stream, scan
from pikastream_jax.serving.errors import ServeError

RATE = 22_050


def tone(seconds=1.0, rate=RATE, channels=1):
    """A different sine in every channel, fading in and out so that coding does not matter at the ends."""
    time = np.arange(round(seconds * rate)) / rate
    waves = [0.5 * np.sin(2 * np.pi * (300 + 200 * channel) * time) for channel in range(channels)]
    return (np.stack(waves, 1) * np.hanning(len(time))[:, None]).astype(np.float32)


def read(source):
    return np.concatenate(list(checked_blocks(source)))


@pytest.mark.parametrize(
    "name, subtype, tolerance",
    [
        ("a.wav", "PCM_U8", 1e-2),
        ("a.wav", "PCM_16", 1e-4),
        ("a.wav", "PCM_24", 1e-6),
        ("a.wav", "PCM_32", 1e-6),
        ("a.wav", "FLOAT", 1e-7),
        ("a.wav", "DOUBLE", 1e-7),
        ("a.wav", "ULAW", 3e-2),
        ("a.flac", None, 1e-4),
        ("a.ogg", None, 5e-2),
        ("a.mp3", None, 5e-2),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_file_is_decoded_to_what_was_written(tmp_path, name, subtype, tolerance, channels):
    sound = tone(channels=channels)
    soundfile.write(tmp_path / name, sound, RATE, subtype=subtype)
    source = open_audio(str(tmp_path / name), 16_000)
    assert (source.rate, source.channels, source.live) == (RATE, channels, False)
    got = read(source)
    assert got.shape == sound.shape
    assert np.abs(got - sound).max() < tolerance
    assert scan(source).samples == len(got)
    assert scan(source).peak == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("channels", [1, 2])
def test_m4a_goes_through_ffmpeg(tmp_path, channels):
    sound = tone(rate=44_100, channels=channels)
    path = str(tmp_path / "a.m4a")
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44_100, layout="mono" if channels == 1 else "stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.T), format="fltp", layout=stream.layout.name)
        frame.sample_rate, frame.pts = 44_100, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    source = open_audio(path, 16_000)
    got = read(source)
    assert (source.rate, source.channels) == (44_100, channels)
    assert 0 <= len(got) - len(sound) <= 1024
    assert np.abs(got[: len(sound)] - sound).max() < 0.05


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("step", [1, 7, 4096])
def test_a_wav_from_a_pipe_equals_the_file(tmp_path, subtype, step):
    sound = tone(0.1, channels=2)
    soundfile.write(tmp_path / "a.wav", sound, RATE, subtype=subtype)
    with open(tmp_path / "a.wav", "rb", buffering=0) as pipe:
        source = open_pcm_stream(lambda count: pipe.read(min(count, step)), "pipe", 16_000)
        assert (source.rate, source.channels, source.live) == (RATE, 2, True)
        got = read(source)
    expected, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    np.testing.assert_allclose(got, expected, atol=1e-7)


@pytest.mark.parametrize("length", [0, 0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_of_unknown_length_is_read_to_the_end(length):
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 0, b"WAVE", b"fmt ", 16, 1, 1, 8000, 16000, 2, 16, b"data", length
    )
    samples = np.arange(-500, 500, dtype="<i2")
    data = header + samples.tobytes()
    source = open_pcm_stream(reader(data), "pipe", 16_000)
    np.testing.assert_array_equal(read(source)[:, 0] * 32768, samples)


def test_what_follows_the_samples_of_a_wav_is_not_played(tmp_path):
    sound = tone(0.1)
    soundfile.write(tmp_path / "a.wav", sound, RATE)
    data = (tmp_path / "a.wav").read_bytes() + b"LIST" + bytes(100)
    assert len(read(open_pcm_stream(reader(data), "pipe", 16_000))) == len(sound)


def test_a_pipe_without_riff_is_raw_pcm_at_the_declared_rate():
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 999).astype("<i2")
    source = open_pcm_stream(reader(samples.tobytes() + b"\x01"), "pipe", 24_000)  # half a sample at the end
    assert (source.rate, source.channels) == (24_000, 1)
    np.testing.assert_array_equal(read(source)[:, 0] * 32768, samples)


def test_a_pipe_is_handed_on_as_it_arrives():
    entrance, exit_ = os.pipe()
    try:
        os.write(exit_, np.arange(100, dtype="<i2").tobytes())
        blocks = open_pcm_stream(lambda count: os.read(entrance, count), "pipe", 16_000).blocks()
        assert sum(len(next(blocks)) for _ in range(2)) == 100  # the four bytes looked at, and the rest
        os.write(exit_, np.arange(7, dtype="<i2").tobytes())
        assert len(next(blocks)) == 7  # with the pipe still open
    finally:
        os.close(entrance)
        os.close(exit_)


def test_loud_float_sound_is_clipped(tmp_path):
    soundfile.write(tmp_path / "a.wav", 3 * tone(0.1), RATE, subtype="FLOAT")
    assert np.abs(read(open_audio(str(tmp_path / "a.wav"), 16_000))).max() == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_sound_that_is_not_a_number_is_refused_with_its_place(tmp_path, bad):
    sound = tone(1.0)
    sound[11_025] = bad
    soundfile.write(tmp_path / "a.wav", sound, RATE, subtype="FLOAT")
    with pytest.raises(ServeError, match=r"sample 11025 \(0.500 s\) is (nan|inf)"):
        scan(open_audio(str(tmp_path / "a.wav"), 16_000))


def truncated(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def make_bad(kind, path):
    """Writes what `kind` says; returns a piece of the expected message."""
    if kind == "missing":
        return "No such file"
    if kind == "directory":
        path.mkdir()
        return "is a directory"
    if kind == "empty":
        path.touch()
        return "is empty"
    if kind == "text":
        path.write_text("to be or not to be, " * 100)
        return "is not audio"
    if kind == "picture":
        from media import write_face

        write_face(path, format="PNG")
        return "no audio"
    if kind == "no samples":
        soundfile.write(path, np.zeros(0, np.float32), RATE, format="WAV")
        return "no samples"
    soundfile.write(path, tone(2.0), RATE, format="FLAC" if kind == "short flac" else "WAV")
    if kind == "wav header only":
        truncated(path, 44)
        return "truncated"
    if kind == "half a wav header":
        truncated(path, 30)
        return "truncated"
    truncated(path, path.stat().st_size // 2)
    return "truncated|damaged"


@pytest.mark.parametrize(
    "kind",
    ["missing", "directory", "empty", "text", "picture", "no samples", "wav header only", "half a wav header"]
    + ["short wav", "short flac"],
)
def test_bad_files_are_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "speech.wav"
    message = make_bad(kind, path)
    with pytest.raises(ServeError, match=message) as caught:
        scan(open_audio(str(path), 16_000))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "before any audio"),
        (b"fLaC" + bytes(100), "carries FLAC"),
        (b"\0\0\0\x20ftypM4A " + bytes(100), "carries MP4 or M4A"),
        (b"FORM" + bytes(4) + b"AIFF" + bytes(100), "carries AIFF"),
        (b"RF64" + bytes(100), "carries RF64"),
        (b"RIFF" + bytes(4) + b"AVI " + bytes(100), "not a WAV"),
        (b"RIFF" + bytes(4) + b"WAVEfmt ", "truncated"),
    ],
)
def test_bad_pipes_are_refused(data, message):
    with pytest.raises(ServeError, match=message):
        open_pcm_stream(reader(data), "pipe", 16_000)


def reader(data: bytes):
    rest = memoryview(data)

    def read_some(count: int) -> bytes:
        nonlocal rest
        piece, rest = rest[:count], rest[count:]
        return bytes(piece)

    return read_some


def test_clicks_are_where_they_are_said_to_be():
    sound = clicks(2.0, 1000)[:, 0]
    assert np.flatnonzero(np.abs(sound) > 0)[0] == 400
