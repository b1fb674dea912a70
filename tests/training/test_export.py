"""Packing runs into one file: the student that went farthest, and what a wrong folder says."""

import json
import sys

import jax
import numpy as np
import pytest
from coded_clips import write_coded

import configs
from pikastream_jax.streaming.package import load_package
from pikastream_jax.training import export
from tests.small import randomised, small_config, small_models

CONFIG = small_config()


def clips_of(folder, preset):
    """Clips that say that they were made for a preset."""
    record = write_coded(folder, CONFIG, words=["smiling"]) / "record.json"
    told = json.loads(record.read_text())
    told["made_with"]["config"] = preset
    record.write_text(json.dumps(told))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Runs of the preset small without weights; those are random and follow from the folder's name."""
    models, params = small_models(CONFIG)

    def weights(path, part):
        return params.flash_vae if path.name.startswith("vae") else randomised(models.denoiser.abstract, len(path.name))

    monkeypatch.setitem(configs.PRESETS, "small", lambda: CONFIG)
    monkeypatch.setattr(export, "load_weights", weights)
    monkeypatch.setattr(export, "updates_done", lambda run: 10)  # what was evaluated later went with a killed run, and the weights are older
    clips_of(tmp_path / "small" / "clips", "small")
    for name in ("vae_streaming", "dit_causal", "dit_self_forcing"):
        (tmp_path / "small" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "small" / name / "config.json").write_text(json.dumps({"stage": name, "seed": 3}))
        (tmp_path / "small" / name / "metrics.jsonl").write_text("".join(f'{{"kind": "held_out", "step": {step}, "loss": {loss}}}\n' for step, loss in ((9, 0.5), (12, 0.4))))
    return tmp_path


def run(monkeypatch, root, *arguments):
    monkeypatch.setattr(sys, "argv", ["export", "--config", "small", "--root", str(root), *arguments])
    return export.main()


def test_the_farthest_student_is_packed(root, monkeypatch, capsys):
    assert run(monkeypatch, root) == 0
    path = root / "small" / "small.safetensors"
    assert str(path) in capsys.readouterr().out
    package = load_package(path)
    assert package.metadata["denoiser"]["stage"] == "dit_self_forcing" and package.metadata["denoiser"]["held_out"]["loss"] == 0.5
    assert package.metadata["flash_vae"]["stage"] == "vae_streaming" and "smiling" in package.tokenizer.words
    wanted = randomised(package.models.denoiser.abstract, len("dit_self_forcing"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.01), package.params.denoiser, wanted)  # bfloat16


def test_a_student_by_name_and_a_file_by_name(root, monkeypatch, tmp_path):
    assert run(monkeypatch, root, "--denoiser", str(root / "small" / "dit_causal"), "--out", str(tmp_path / "other.safetensors")) == 0
    assert load_package(tmp_path / "other.safetensors").metadata["denoiser"]["stage"] == "dit_causal"


def test_a_file_streams_as_its_student_was_trained_or_was_packed_before(root, monkeypatch, tmp_path):
    def packed(name, *arguments):
        assert run(monkeypatch, root, *arguments, "--out", str(tmp_path / name)) == 0
        stream = load_package(tmp_path / name).config.stream
        return stream.schedule, stream.steps

    trained = CONFIG.stream.steps
    (root / "small" / "dit_causal_rolling" / "checkpoints").mkdir(parents=True)
    (root / "small" / "dit_causal_rolling" / "config.json").write_text(json.dumps({"stage": "dit_causal", "seed": 3, "config": {"stage": {"schedule": "rolling"}}}))
    (root / "small" / "dit_causal_rolling" / "metrics.jsonl").touch()
    rolling, forced = str(root / "small" / "dit_causal_rolling"), str(root / "small" / "dit_self_forcing")
    assert packed("own") == ("sequential", trained) != packed("one", "--steps", "1") == ("sequential", 1)
    assert packed("rolling", "--denoiser", rolling) == ("rolling", trained)
    assert packed("again", "--denoiser", str(tmp_path / "one")) == ("sequential", 1)
    assert packed("mean", "--denoiser", str(tmp_path / "one"), forced, "--steps", "3") == ("sequential", 3)


def test_the_mean_of_students_tells_of_each(root, monkeypatch, tmp_path):
    """The second time one of them is the file made the first time: how that was made stands within."""
    causal, forced, first, second = *(root / "small" / name for name in ("dit_causal", "dit_self_forcing")), tmp_path / "first", tmp_path / "second"
    assert run(monkeypatch, root, "--denoiser", str(causal), str(forced), "--shares", "0.25", "0.75", "--out", str(first)) == 0
    package = load_package(first)
    wanted = [randomised(package.models.denoiser.abstract, len(path.name)) for path in (causal, forced)]
    jax.tree.map(lambda mean, a, b: np.testing.assert_allclose(mean, 0.25 * a + 0.75 * b, rtol=0.01, atol=0.01), package.params.denoiser, *wanted)
    parts = package.metadata["denoiser"]["mean of"]
    assert [(part["share"], part["made"]["stage"]) for part in parts] == [(0.25, "dit_causal"), (0.75, "dit_self_forcing")]
    assert run(monkeypatch, root, "--denoiser", str(causal), str(first), "--out", str(second)) == 0
    again = load_package(second).metadata["denoiser"]["mean of"]
    assert [part["share"] for part in again] == [0.5, 0.5] and again[1]["made"] == package.metadata["denoiser"]


def test_bad_input_is_one_line(root, monkeypatch, capsys):
    clips_of(root / "others", "tiny")
    (root / "empty" / "small").mkdir(parents=True)
    student = str(root / "small" / "dit_causal")
    assert run(monkeypatch, root, "--steps", "1", "--out", str(root / "one")) == 0
    capsys.readouterr()
    for arguments, said in (
        (["--clips", str(root / "others")], "clips of preset tiny"),
        (["--clips", str(root / "gone")], "gone"),
        (["--root", str(root / "empty")], "has no dit_student_reward or"),
        (["--config", "huge"], "no preset is called 'huge'"),
        (["--steps", "0"], "steps 0 must lie in 1-64"),
        (["--denoiser", student, str(root / "one")], "students that stream in steps 1 and 2: give --steps"),
        (["--shares", "0.5", "0.5"], "--shares has 2 numbers for 1 students"),
        (["--denoiser", student, student, "--shares", "0.7", "0.7"], "--shares 0.7 0.7 must be above 0 and make 1 together"),
        (["--denoiser", student, student, "--shares", "nan", "1.0"], "--shares nan 1.0 must be above 0"),
    ):
        assert run(monkeypatch, root, *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("export: ") and said in error and error.count("\n") == 1
