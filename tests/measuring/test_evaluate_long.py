"""Long streams by small random models: what is measured for whom, and that streams side by side are the streams alone."""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest

import configs
from pikastream_jax import evaluate_long
from pikastream_jax.measuring.batch_streams import BatchStream, audio_of_chunk
from pikastream_jax.measuring.calibration import IdentityMetric
from pikastream_jax.measuring.long_streams import MEASURES, make_cast, run_long
from pikastream_jax.measuring.subjects import NEUTRAL, SMILING, draw, person, portrait_state
from pikastream_jax.measuring.swaps import swapped_prompts, swapped_references
from pikastream_jax.streaming.generator import load_generator
from pikastream_jax.streaming.package import save_package
from pikastream_jax.text import Tokenizer
from tests.small import small_config, small_models

CONFIG = small_config(height=64, width=64, steps=1)
METRIC = IdentityMetric(np.eye(32))
PEOPLE = (9_000_000, 9_000_001, 9_000_002)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of the small preset with square pictures."""
    path = tmp_path_factory.mktemp("long") / "small.safetensors"
    save_package(path, CONFIG, small_models(CONFIG)[1], Tokenizer(("smiling", "person"), CONFIG.text.length), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.PRESETS, "small", lambda: CONFIG)
        yield path


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
    """These models run for milliseconds and would be compiled for minutes."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def load(weights):
    return functools.cache(functools.partial(load_generator, weights))


def portraits(people=PEOPLE):
    return [draw(person(seed), portrait_state(seed), 64) for seed in people]


@pytest.fixture(scope="module")
def cast():
    speech = (0.1 * np.random.default_rng(0).normal(size=32_000)).astype(np.float32)
    return make_cast(PEOPLE, speech, 12.0)


@pytest.mark.parametrize("schedule", ["sequential", pytest.param("rolling", marks=pytest.mark.slow)])
def test_streams_side_by_side_are_the_streams_alone(load, cast, schedule):
    generator = load(schedule=schedule) if schedule == "rolling" else load()
    together = BatchStream(generator, portraits(), [NEUTRAL] * 3, PEOPLE)
    alone = generator.session(portraits()[1], NEUTRAL, PEOPLE[1])
    for index in range(4):
        audio = audio_of_chunk(generator, cast.audio, index)
        rows, row = together.step(audio), np.asarray(alone.step(audio[1]))
        assert rows.shape[1] == len(row) == (0 if index < generator.config.stream.delay else 8)
        assert np.abs(rows[1].astype(int) - row).max(initial=0) <= 1, "8 bits, products in another order"


def test_a_swap_changes_what_follows_and_only_that(load, cast):
    generator = load()
    for change in ("swap_references", "swap_prompts"):
        plain, swapped = (BatchStream(generator, portraits(), [NEUTRAL] * 3, PEOPLE) for _ in range(2))
        audio = audio_of_chunk(generator, cast.audio, 0)
        assert (plain.step(audio) == swapped.step(audio)).all()
        getattr(swapped, change)(portraits()[::-1] if change == "swap_references" else [SMILING] * 3)
        audio = audio_of_chunk(generator, cast.audio, 1)
        different = (plain.step(audio) != swapped.step(audio)).any(axis=(1, 2, 3, 4))
        # The middle row's picture is its own again: only the others see somebody new.
        assert different.tolist() == ([True, False, True] if change == "swap_references" else [True] * 3)


def test_every_measure_for_every_person_at_every_mark(load, estimator, cast):
    run = run_long(load(), estimator, METRIC, cast, (10, 11))
    assert sorted(run.marks) == [10, 11] and run.step_seconds > 0
    for row in run.marks.values():
        assert set(row) == set(MEASURES) and all(values.shape == (3,) for values in row.values())
        assert (row["flicker"] > 0).all() and (row["identity_distance"] > 0).all()


def test_marks_that_make_no_sense_are_refused(load, estimator, cast):
    for marks in ((5,), (11, 10), ()):
        with pytest.raises(ValueError, match="must ascend from 10 s"):
            run_long(load(), estimator, METRIC, cast, marks)
    with pytest.raises(ValueError, match="before the mark at 20 s"):
        run_long(load(), estimator, METRIC, dataclasses.replace(cast, audio=cast.audio[:, :16_000]), (20,))


def test_swaps_are_counted_for_every_stream(load, estimator, cast):
    reference = swapped_references(load(), estimator, METRIC, PEOPLE, cast.audio)
    prompt = swapped_prompts(load(), estimator, PEOPLE, cast.audio)
    assert reference.frames.shape == prompt.frames.shape == (3,) and reference.observed == 64


def test_two_ways_to_run_the_same_weights_from_the_command_line(weights, load, tmp_path, monkeypatch, capsys):
    """Both by one generator, to compile it once; what is loaded is asked for in two ways."""
    asked = []

    def recorded(path, **stream):
        asked.append((path, stream))
        return load()

    out = tmp_path / "long.json"
    argv = ["evaluate_long", "--weights", str(weights), str(weights), "--clean-pass", "False", "True", "--steps", "1", "--seconds", "10", "--people", "3"]
    monkeypatch.setattr(sys, "argv", [*argv, "--out", str(out)])
    monkeypatch.setattr(evaluate_long, "calibrate", lambda *_: (None, METRIC))
    monkeypatch.setattr(evaluate_long, "load_generator", recorded)
    assert evaluate_long.main() == 0
    assert asked == [(weights, {"steps": 1, "clean_pass": False}), (weights, {"steps": 1, "clean_pass": True})]
    text = capsys.readouterr().out
    assert "at 10 s: small steps=1 clean_pass=False against small steps=1 clean_pass=True" in text and "identity_distance" in text
    result = json.loads(out.read_text())
    assert list(result["contestants"]) == ["small steps=1 clean_pass=False", "small steps=1 clean_pass=True"]
    one = result["contestants"]["small steps=1 clean_pass=False"]
    assert len(one["people"]["10"]["flicker"]) == 3 and one["delay_frames"] == 0 and one["step_ms_one_stream"] > 0
    assert one["stream"] == dataclasses.asdict(load().config.stream)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "gone.safetensors"], "gone.safetensors"),
        (["--weights", "a", "b", "c", "--schedule", "rolling", "sequential"], "--schedule has 2 values for 3 weights"),
        (["--weights", "a", "--people", "1"], "--people 1 must be at least 2"),
    ],
)
def test_bad_input_is_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate_long", *arguments])
    try:
        code = evaluate_long.main()
    except SystemExit as error:
        code = error.code
    assert code and said in capsys.readouterr().err
