"""The weights file: what goes in comes out, and what does not fit is named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import configs
from pikastream_jax.streaming.package import load_package, save_package
from pikastream_jax.streaming.step import ModelParams
from pikastream_jax.text import Tokenizer
from pikastream_jax.weights import safetensors_io
from tests.small import small_config, small_models

TOKENIZER = Tokenizer(("smiling", "woman"), small_config().text.length)
MADE = {"command": "train.py --stage dit_causal", "seed": 3}


@pytest.fixture
def known(monkeypatch):
    """The small preset has a name for the time of a test."""
    monkeypatch.setitem(configs.PRESETS, "small", small_config)
    return monkeypatch


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "small.safetensors"
    _, params = small_models(small_config())
    save_package(path, small_config(), params, TOKENIZER, MADE)
    return path


def test_what_goes_in_comes_out(known, file):
    package = load_package(file)
    assert package.config == small_config()
    assert package.tokenizer.encode("a smiling woman")[0].tolist() == TOKENIZER.encode("a smiling woman")[0].tolist()
    assert package.tokenizer.length == small_config().text.length
    assert package.metadata == MADE
    _, params = small_models(small_config())
    kept, loaded = safetensors_io.flatten(as_tree(params)), safetensors_io.flatten(as_tree(package.params))
    assert kept.keys() == loaded.keys()
    for name, value in kept.items():
        assert loaded[name].dtype == jnp.float32, "bfloat16 is for the file alone"
        rounded = np.asarray(value).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(loaded[name], rounded, err_msg=name)
    assert file.stat().st_size < 2 * sum(leaf.size for leaf in jax.tree.leaves(params)) + 40_000


def as_tree(params: ModelParams):
    statistics = {"mean": params.statistics.mean, "std": params.statistics.std}
    return {"denoiser": params.denoiser, "flash_vae": params.flash_vae, "statistics": statistics}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file .*absent.safetensors"):
        load_package(tmp_path / "absent.safetensors")


def test_other_files_are_refused(tmp_path):
    text = tmp_path / "notes.safetensors"
    text.write_text("no tensors here, only words" * 10)
    with pytest.raises(ValueError, match="notes.safetensors is not a readable safetensors file"):
        load_package(text)
    foreign = tmp_path / "foreign.safetensors"
    safetensors_io.save(foreign, {"layer": {"kernel": np.zeros((2, 2), np.float32)}})
    with pytest.raises(ValueError, match="foreign.safetensors holds no pikastream-jax model: make one with"):
        load_package(foreign)


def test_a_preset_that_nobody_knows_is_named(file):
    with pytest.raises(ValueError, match="no preset is called 'small'"):
        load_package(file)


def test_other_sizes_than_the_presets_are_named(known, file):
    def changed():
        config = small_config()
        return dataclasses.replace(config, dit=dataclasses.replace(config.dit, mlp_dim=96))

    known.setitem(configs.PRESETS, "small", changed)
    with pytest.raises(
        ValueError, match="was made for dit .*'mlp_dim': 64.* but the preset 'small' has .*'mlp_dim': 96"
    ):
        load_package(file)


def test_schedule_and_steps_are_the_files_choice_and_all_else_the_presets(known, tmp_path):
    """A student is trained for one schedule and may be best in few steps; the window may change without a new file."""
    _, params = small_models(small_config())
    path = tmp_path / "rolling.safetensors"
    save_package(path, small_config(schedule="rolling", steps=1), params, TOKENIZER, MADE)
    known.setitem(configs.PRESETS, "small", lambda: small_config(steps=3, window=8))
    stream = load_package(path).config.stream
    assert (stream.schedule, stream.steps, stream.window) == ("rolling", 1, 8)
    stream = load_package(path, schedule="sequential", steps=2).config.stream
    assert (stream.schedule, stream.steps) == ("sequential", 2)


def test_a_file_that_names_no_schedule_takes_the_presets(known, file, tmp_path):
    """As the first releases do."""
    tree, header = safetensors_io.load(file)
    record = json.loads(header["pikastream"])
    del record["config"]["stream"]["schedule"]
    safetensors_io.save(tmp_path / "old.safetensors", tree, {"pikastream": json.dumps(record)})
    assert load_package(tmp_path / "old.safetensors").config == small_config()


def test_what_ships_streams_in_two_steps():
    stream = load_package().config.stream
    assert (stream.schedule, stream.steps) == ("sequential", 2) and configs.preset("tiny").stream.steps == 4


@pytest.mark.parametrize("part", ["denoiser", "flash_vae", "statistics"])
def test_a_missing_part_is_named(known, file, tmp_path, part):
    tree, header = safetensors_io.load(file)
    removed = sorted(safetensors_io.flatten(tree.pop(part)))[0]
    path = tmp_path / "part.safetensors"
    safetensors_io.save(path, tree, header)
    with pytest.raises(ValueError, match=f"missing {removed}"):
        load_package(path)
