import numpy as np
import pytest
import soundfile
from fakes import FakeGenerator
from media import play, write_clicks, write_face
from PIL import Image

from pikastream_jax.serving import image
from pikastream_jax.serving.command import Options, main, output_size, parse


@pytest.fixture
def folder(tmp_path):
    write_clicks(tmp_path / "speech.wav", 1.0)
    write_face(tmp_path / "face.png")
    return tmp_path


def run(folder, *changes, load=lambda weights=None: FakeGenerator(weights)):
    """Runs in `folder` with working arguments, in which `changes` (name, value, name, value, ...) are replaced."""
    arguments = {"--audio": folder / "speech.wav", "--image": folder / "face.png", "--output": folder / "out.mp4"}
    arguments |= dict(zip(changes[::2], changes[1::2], strict=True))
    argv = [str(word) for name, value in arguments.items() if value is not None for word in (name, value)]
    return main(argv, load)


def silent_wav(folder):
    soundfile.write(folder / "bad.wav", np.zeros(8000), 16_000)


def nan_wav(folder):
    soundfile.write(folder / "bad.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")


BAD = {
    "no audio": (["--audio", None], 2, "--audio"),
    "missing audio": (["--audio", "missing.wav"], 1, "missing.wav"),
    "NaN audio": (["--audio", "bad.wav"], 1, "is nan"),
    "not audio": (["--audio", "face.png"], 1, "no audio"),
    "missing image": (["--image", "missing.png"], 1, "missing.png"),
    "not an image": (["--image", "speech.wav"], 1, "not an image"),
    "image and avatar": (["--avatar", "someone"], 2, "not both"),
    "unknown avatar": (["--image", None, "--avatar", "nobody"], 1, "alice, bob"),
    "unknown option": (["--nonsense", "1"], 2, "nonsense"),
    "text for a number": (["--fps", "fast"], 2, "fps"),
    "fps of 0": (["--fps", "0"], 2, "--fps 0"),
    "fps of nan": (["--fps", "nan"], 2, "--fps nan"),
    "odd size": (["--size", "255"], 2, "--size 255"),
    "huge size": (["--size", "100000"], 2, "--size 100000"),
    "negative seed": (["--seed", "-1"], 2, "--seed -1"),
    "rate of 1": (["--audio-rate", "1"], 2, "--audio-rate 1"),
    "unknown output": (["--output", "out.avi"], 1, ".mp4 or .ts"),
    "output in no folder": (["--output", "nowhere/out.mp4"], 1, "no directory"),
    "output onto a folder": (["--output", "folder.mp4"], 1, "is a directory"),
    "metrics in no folder": (["--metrics", "nowhere/m.json"], 1, "no directory"),
    "bad RTP": (["--output", "rtp://localhost"], 1, "rtp://HOST:PORT"),
    "missing weights": (["--weights", "none.safetensors"], 1, "cannot load the model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line_and_leaves_nothing(folder, monkeypatch, capfd, case):
    changes, expected_status, message = BAD[case]
    monkeypatch.chdir(folder)
    gallery = folder / "gallery"
    gallery.mkdir()
    for name in ("bob", "alice"):
        write_face(gallery / f"{name}.png")
    monkeypatch.setattr(image, "_gallery", lambda: gallery)
    nan_wav(folder)
    (folder / "folder.mp4").mkdir()
    before = sorted(folder.rglob("*"))
    assert run(folder, *changes) == expected_status
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], captured.err
    assert sorted(folder.rglob("*")) == before


def test_silence_is_listened_to(folder, capsys):
    silent_wav(folder)
    assert run(folder, "--audio", folder / "bad.wav") == 0
    assert "warning" in capsys.readouterr().err
    assert len(play(folder / "out.mp4").frames) == 12


def test_a_face_unlike_the_training_faces_is_warned_of_with_the_figure(folder, capsys):
    assert run(folder) == 0
    assert "warning" not in capsys.readouterr().err
    Image.new("RGB", (256, 256), (20, 20, 20)).save(folder / "flat.png")
    assert run(folder, "--image", folder / "flat.png") == 0
    assert "12.0 dB, below 20.0 dB" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, shown", [([], "alice"), (["--avatar", "bob"], "bob")])
def test_the_gallery(folder, monkeypatch, arguments, shown):
    gallery = folder / "gallery"
    gallery.mkdir()
    for level, name in enumerate(["bob", "alice"]):
        Image.new("RGB", (256, 256), (level, 0, 0)).save(gallery / f"{name}.png")
    monkeypatch.setattr(image, "_gallery", lambda: gallery)
    seen = []

    class Watcher(FakeGenerator):
        def session(self, image, prompt, seed):
            seen.append((int(image[0, 0, 0]), prompt, seed))
            return super().session(image, prompt, seed)

    changes = ["--image", None, *arguments, "--prompt", "a man smiling", "--seed", "7"]
    assert run(folder, *changes, load=lambda weights=None: Watcher()) == 0
    assert seen == [(["bob", "alice"].index(shown), "a man smiling", 7)]


@pytest.mark.parametrize("option", ["--output", "--metrics"])
@pytest.mark.parametrize("name", ["speech", "face"])
def test_nothing_is_written_over_what_the_stream_is_made_from(folder, capsys, option, name):
    (folder / "speech.wav").rename(folder / "speech.mp4")
    (folder / "face.png").rename(folder / "face.mp4")
    before = (folder / f"{name}.mp4").read_bytes()
    inputs = ("--audio", folder / "speech.mp4", "--image", folder / "face.mp4")
    assert run(folder, *inputs, option, folder / f"{name}.mp4") == 1
    assert f"would replace the {'audio' if name == 'speech' else 'image'}" in capsys.readouterr().err
    assert (folder / f"{name}.mp4").read_bytes() == before


def test_how_it_streams_goes_to_the_model_and_what_is_not_said_is_left_to_it(folder):
    seen = []

    def load(weights=None, **stream):
        seen.append(stream)
        return FakeGenerator()

    assert run(folder, load=load) == 0
    assert run(folder, "--chunk", 1, "--steps", 2, "--schedule", "rolling", "--precision", "bfloat16", load=load) == 0
    assert seen == [{}, {"chunk": 1, "steps": 2, "schedule": "rolling", "precision": "bfloat16"}]


def test_a_way_of_streaming_that_makes_no_sense_is_one_line(folder, capfd):
    def load(weights=None, **stream):
        raise ValueError(f"stream: steps {stream['steps']} must lie in 1-64")

    assert run(folder, "--steps", 0, load=load) == 1
    assert capfd.readouterr().err.splitlines() == ["error: cannot load the model: stream: steps 0 must lie in 1-64"]


@pytest.mark.parametrize(
    "model, size, expected",
    [
        ((256, 256), None, (256, 256)),
        ((256, 256), 360, (360, 360)),
        ((480, 832), None, (480, 832)),
        ((480, 832), 720, (720, 1248)),
        ((832, 480), 720, (1248, 720)),
        ((96, 160), 50, (50, 84)),  # 83.3: the nearest even number
        ((160, 96), 64, (106, 64)),  # 106.7
    ],
)
def test_size_is_the_shorter_side_and_keeps_the_models_shape(model, size, expected):
    assert output_size(*model, size) == expected


def test_defaults_and_help(capsys):
    assert parse(["--audio", "-"]) == Options(audio="-")
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for option in ("--audio", "--image", "--avatar", "--prompt", "--seed", "--output", "--fps", "--size", "--realtime", "--chunk", "--schedule"):
        assert option in text
