"""Whole streams, with a generator whose brightness is the loudness: what is written is decoded again and measured."""

import _thread
import json
import math
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from fakes import FakeGenerator
from media import play, write_clicks, write_face

from pikastream_jax.serving.audio_in import open_audio
from pikastream_jax.serving.command import main
from pikastream_jax.serving.encode import MediaFormat
from pikastream_jax.serving.metrics import Meter, Progress
from pikastream_jax.serving.outputs import FileOutput, PipeOutput
from pikastream_jax.serving.pipeline import Pipeline

FRAME = 0.04  # seconds
MAX_OFFSET = 0.02  # seconds between sound and picture


def run(tmp_path, output, *arguments, generator=None, **kwargs):
    """Serves clicks; returns the exit status."""
    write_clicks(tmp_path / "speech.wav", **kwargs)
    write_face(tmp_path / "face.png")
    argv = ["--audio", str(tmp_path / "speech.wav"), "--image", str(tmp_path / "face.png"), "--output", str(output)]
    return main([*argv, *map(str, arguments)], lambda weights=None: generator or FakeGenerator())


def assert_in_sync(played, expected):
    assert len(played.flashes) == len(played.clicks) == len(expected)
    np.testing.assert_allclose(played.clicks, expected, atol=0.003)
    np.testing.assert_allclose(played.clicks, played.flashes, atol=MAX_OFFSET)


@pytest.mark.parametrize("container", ["mp4", "ts"])
@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2)])
def test_sound_and_picture_are_together_from_first_to_last(tmp_path, container, rate, channels):
    path = tmp_path / f"out.{container}"
    # From the very first frame to the last one, over several chunks.
    assert run(tmp_path, path, seconds=4.2, rate=rate, channels=channels, first=0.0, every=1.04) == 0
    played = play(path)
    assert_in_sync(played, [0.0, 1.04, 2.08, 3.12, 4.16])
    assert played.codecs == {"h264", "aac"}
    assert len(played.frames) == 105  # 4.2 s exactly
    assert abs(played.sound_end - 4.2) < FRAME and played.times[-1] == pytest.approx(4.16, abs=1e-3)
    np.testing.assert_allclose(np.diff(played.times), FRAME, atol=1e-3)


@pytest.mark.parametrize("seconds", [0.001, 0.47, 0.48, 0.481, 1.3333])
def test_the_video_is_as_long_as_the_sound(tmp_path, seconds):
    assert run(tmp_path, tmp_path / "out.mp4", seconds=seconds) == 0
    played = play(tmp_path / "out.mp4")
    assert abs(len(played.frames) * FRAME - seconds) <= FRAME


@pytest.mark.parametrize("fps, size", [(30, 256), (12.5, 128), (29.97, 360)])
def test_another_rate_and_size_change_the_output_only(tmp_path, fps, size):
    generator = FakeGenerator()
    path = tmp_path / "out.mp4"
    assert run(tmp_path, path, "--fps", fps, "--size", size, generator=generator, first=0.4, every=0.8) == 0
    played = play(path)
    assert generator.steps == 7  # 3 s in chunks of 0.48 s, whatever is put out
    assert played.frames.shape[1:3] == (size, size)
    assert abs(len(played.frames) / fps - 3.0) <= 1 / fps
    # A flash starts with the output frame that first shows it, up to one output frame late.
    late = np.asarray(played.flashes) - played.clicks
    assert len(late) == 4 and late.min() > -0.003 and late.max() < 1 / fps + 0.003
    inside = played.frames[:, size // 2, size // 2].mean(axis=-1)
    assert inside.max() > 200 and inside.min() < 10


@pytest.mark.parametrize(
    "arguments, expected", [([], (96, 160)), (["--size", 48], (48, 80)), (["--size", 200], (200, 334))]
)
@pytest.mark.parametrize("upright", [False, True])
def test_a_model_that_is_not_square(tmp_path, arguments, expected, upright):
    turn = slice(None, None, -1 if upright else 1)
    model, (height, width) = (96, 160)[turn], expected[turn]
    path = tmp_path / "out.mp4"
    generator = FakeGenerator(height=model[0], width=model[1])
    assert run(tmp_path, path, *arguments, generator=generator, seconds=2.0, first=0.0, every=0.8) == 0
    played = play(path)
    assert_in_sync(played, [0.0, 0.8, 1.6])
    assert played.frames.shape == (50, height, width, 3)
    # The box that flashes fills the middle half each way, in the place and shape in which the model drew it.
    lit = played.frames[0].mean(axis=-1) > 110
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    found = [rows[0], rows[-1] + 1, columns[0], columns[-1] + 1]
    np.testing.assert_allclose(found, [height / 4, height * 3 / 4, width / 4, width * 3 / 4], atol=2)


@pytest.mark.parametrize("height, width", [(256, 256), (96, 160)])
def test_colours_survive(tmp_path, height, width):
    colour = np.array([200, 90, 40], np.uint8)

    class Painter(FakeGenerator):
        def session(self, image, prompt, seed):
            session = super().session(image, prompt, seed)
            session.step = lambda audio: np.broadcast_to(colour, (12, height, width, 3))
            return session

    assert run(tmp_path, tmp_path / "out.mp4", seconds=0.5, generator=Painter(height=height, width=width)) == 0
    frames = play(tmp_path / "out.mp4").frames.astype(int)
    assert np.abs(frames - colour).max() <= 4


def test_realtime_paces_the_stream(tmp_path):
    started = time.perf_counter()
    assert run(tmp_path, tmp_path / "out.ts", "--realtime", "--metrics", tmp_path / "m.json", seconds=1.5) == 0
    # The first chunk is there after 0.48 s, and its packets take 1.5 s from there.
    assert 1.9 < time.perf_counter() - started < 3.5
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["time_to_first_frame_seconds"] < 0.3 and metrics["real_time_factor"] < 1
    assert_in_sync(play(tmp_path / "out.ts"), [0.4, 1.4])


def test_metrics_say_what_happened(tmp_path, capsys):
    generator = FakeGenerator(step_seconds=0.05)
    metrics = tmp_path / "metrics.json"
    assert run(tmp_path, tmp_path / "out.mp4", "--metrics", metrics, generator=generator, seconds=3.0) == 0
    found = json.loads(metrics.read_text())
    assert found["frames"] == 75 and found["generated_frames"] == 84
    assert found["audio_seconds"] == found["video_seconds"] == 3.0
    assert found["chunk_seconds"]["count"] == 7
    assert 0.05 <= found["chunk_seconds"]["p50"] <= found["chunk_seconds"]["p95"]
    assert found["time_to_first_frame_seconds"] >= 0.05 and found["first_chunk_audio_seconds"] == 0.48
    assert found["fps"] == pytest.approx(75 / found["seconds"], rel=1e-2)
    assert found["real_time_factor"] == pytest.approx(3 / found["seconds"], rel=1e-2)
    assert found["end"] == "finished" and {"python", "av", "jax"} <= set(found["versions"])
    text = capsys.readouterr().err
    assert "FPS" in text and "RTF" in text and "first frame" in text and "out.mp4" in text


def pipeline(tmp_path, generator, output, seconds, media):
    source = open_audio(str(write_clicks(tmp_path / "long.wav", seconds)), 16_000)
    session = generator.session(np.zeros((256, 256, 3), np.uint8), "", 0)
    meter = Meter()
    return Pipeline(source, generator, session, output, media, meter, Progress(meter, None)), meter


def test_a_slow_reader_slows_the_model_and_nothing_piles_up(tmp_path):
    generator, media, gate = FakeGenerator(), MediaFormat(256, 256, Fraction(25), 1), threading.Event()
    output = PipeOutput(media, lambda data: gate.wait(10))
    stream, meter = pipeline(tmp_path, generator, output, 15.0, media)
    thread = threading.Thread(target=stream.run, daemon=True)
    thread.start()
    time.sleep(0.7)
    # Held in the queues and in the hands of the stages, of 32 chunks.
    assert generator.steps <= 10
    gate.set()
    thread.join(20)
    assert generator.steps == 32 and meter.frames == 375


def test_a_chunk_leaves_while_the_next_is_made(tmp_path):
    """Each chunk's frames, all but what the audio codec delays, are out before the next chunk is even done."""
    media, written, steps = MediaFormat(256, 256, Fraction(25), 1), [], []

    class Slow(FakeGenerator):
        def session(self, image, prompt, seed):
            session = super().session(image, prompt, seed)
            step = session.step

            def timed(audio):
                frames = step(audio)
                steps.append(time.perf_counter())
                return frames

            session.step = timed
            return session

    output = PipeOutput(media, lambda data: written.append((time.perf_counter(), data)))
    stream, _ = pipeline(tmp_path, Slow(step_seconds=0.3), output, 1.92, media)
    stream.run()
    for chunk in range(3):
        before_next = b"".join(data for moment, data in written if moment < steps[chunk + 1] - 0.01)
        assert (
            len(play(before_next).frames) >= 12 * (chunk + 1) - 1
        )  # a reader cannot know that the last picture is whole


def test_a_model_that_answers_late_stays_in_sync(tmp_path):
    """Frames that come two chunks after their sound are shown with it, to the last."""

    class Late(FakeGenerator):
        def session(self, image, prompt, seed):
            session = super().session(image, prompt, seed)
            step, made = session.step, []

            def delayed(audio):
                made.append(step(audio))
                return made[-3] if len(made) > 2 else made[-1][:0]

            session.step, session.finish = delayed, lambda: made[-2:]
            return session

    for seconds in (3.0, 0.7):
        assert run(tmp_path, tmp_path / "out.mp4", seconds=seconds, generator=Late(), first=0.4, every=1.0) == 0
        assert len(play(tmp_path / "out.mp4").frames) == math.ceil(seconds * 25)
        assert_in_sync(play(tmp_path / "out.mp4"), [at for at in (0.4, 1.4, 2.4) if at < seconds])


def test_a_failing_model_leaves_nothing_behind(tmp_path):
    class Broken(FakeGenerator):
        def session(self, image, prompt, seed):
            session = super().session(image, prompt, seed)
            step = session.step
            session.step = lambda audio: step(audio) if session.index < 3 else 1 / 0
            return session

    with pytest.raises(ZeroDivisionError):  # a fault of the program is not dressed up as bad input
        run(tmp_path, tmp_path / "out.mp4", generator=Broken(), seconds=3.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["face.png", "speech.wav"]


def test_one_ctrl_c_does_not_spoil_a_stream_that_is_being_closed(tmp_path, monkeypatch):
    close = FileOutput.close

    def slow_close(self):
        threading.Timer(0.1, _thread.interrupt_main).start()
        time.sleep(0.5)
        close(self)

    monkeypatch.setattr(FileOutput, "close", slow_close)
    assert run(tmp_path, tmp_path / "out.mp4", seconds=1.0) == 0
    assert len(play(tmp_path / "out.mp4").frames) == 25


def test_an_existing_file_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "out.ts"
    path.write_bytes(b"old")
    output = FileOutput(path, MediaFormat(256, 256, Fraction(25), 1))
    assert path.read_bytes() == b"old"
    output.discard()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
