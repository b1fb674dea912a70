"""The whole evaluation on a generator whose faults are known."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from pikastream_jax import evaluate
from pikastream_jax.measuring.lipsync import compare
from pikastream_jax.measuring.sheet import save_sheet
from pikastream_jax.measuring.streams import generated, make_clip, make_scene
from pikastream_jax.measuring.subjects import NEUTRAL, SPEECH, read_speech
from tests.measuring.truth_face import CHUNK, TruthFace


@pytest.fixture(scope="module")
def speech():
    return [read_speech(SPEECH)]


def test_drawn_truth_passes_every_measure(tmp_path):
    arguments = evaluate.Arguments(identities=(9_000_000, 9_000_001), quick=True)
    result, clips = evaluate.evaluate(TruthFace(), arguments)
    made = result["generated"]
    assert made["lip_sync"]["opening"]["r"] > 0.95 and made["lip_sync"]["opening"]["lag_frames"] == 0
    assert made["lip_sync"]["width"]["r"] > 0.9
    assert made["lip_sync"]["closures"]["f1"] > 0.8
    assert made["identity"]["wins"] == 1.0
    assert made["flicker"] == 0.0
    assert made["smiling_against_neutral"] == 1.0
    assert result["flash_vae"]["held_out_faces"]["psnr"] == 99.0
    text = json.dumps(evaluate.plain(result), allow_nan=False)
    assert json.loads(text)["run"]["identities"] == [9_000_000, 9_000_001]
    assert "identity wins 100%" in evaluate.summary(result)
    save_sheet(tmp_path / "sheet.png", clips)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000 and np.asarray(sheet).std() > 20


def test_late_lips_are_found_late(estimator, speech):
    scene = make_scene(9_000_002, NEUTRAL, speech, 0, 8 * CHUNK)
    clip = make_clip(scene, generated(TruthFace(delay=4)), estimator)
    report = compare([scene.truth.opening], [clip.reading.opening], [scene.truth.width], [clip.reading.width])
    assert report["opening"]["lag_frames"] == 4
    assert report["opening"]["r"] > 0.9 > report["opening"]["r_at_lag_0"] + 0.1
    assert report["closures"]["f1"] < 0.8


def test_smaller_pictures_are_measured_too(estimator, speech):
    scene = make_scene(9_000_002, NEUTRAL, speech, 0, 6 * CHUNK, 128)
    clip = make_clip(scene, generated(TruthFace(height=128)), estimator)
    assert clip.frames.shape[1:] == scene.reference.shape == (128, 128, 3) and clip.background_change == 0.0
    report = compare([scene.truth.opening], [clip.reading.opening], [scene.truth.width], [clip.reading.width])
    assert report["opening"]["r"] > 0.95 and report["opening"]["lag_frames"] == 0 and report["width"]["r"] > 0.9


def test_a_generator_that_loses_frames_is_caught(estimator, speech):
    scene = make_scene(9_000_002, NEUTRAL, speech, 0, 4 * CHUNK)
    with pytest.raises(ValueError, match="out of step"):
        make_clip(scene, lambda scene: np.zeros((40, 256, 256, 3), np.uint8), estimator)


def test_figures_that_json_cannot_hold_become_null():
    assert evaluate.plain({"a": float("nan"), "b": [float(1 / 3)], "c": 2}) == {"a": None, "b": [0.3333], "c": 2}


def test_a_wrong_option_is_refused_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--minutes-of-drift", "0.2"])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "--minutes-of-drift 0.2" in capsys.readouterr().err


def test_missing_weights_are_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--weights", str(tmp_path / "gone.safetensors")])
    assert evaluate.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("evaluate: ") and "gone.safetensors" in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_shipped_weights_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--quick", "--out", str(tmp_path)])
    assert evaluate.main() == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["flash_vae"]["held_out_faces"]["psnr"] > 25
    assert (tmp_path / "sheet.png").is_file()
    assert "FlashVAE" in capsys.readouterr().out


def test_clips_last_as_long_in_chunks_of_any_size():
    for frames in (4, 8, 12):
        plan = evaluate.FULL.in_chunks_of(frames)
        for name in ("chunks", "smiling_chunks", "other_chunks", "silent_chunks"):
            assert abs(frames * getattr(plan, name) - 12 * getattr(evaluate.FULL, name)) <= frames / 2, (frames, name)
    assert evaluate.FULL.in_chunks_of(12) == evaluate.FULL
