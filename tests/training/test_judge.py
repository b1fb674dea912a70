"""Judging runs on held-out clips, by small random models and clips that say which they are."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coded_clips import coded_batch, coded_constants, write_coded
from small_corpus import small_corpus

import configs
from pikastream_jax.data.corpus import MEL_FRAMES, dequantise_tracks
from pikastream_jax.measuring.calibration import IdentityMetric
from pikastream_jax.measuring.estimator import Reading
from pikastream_jax.streaming.package import save_package
from pikastream_jax.training import compare, judge
from pikastream_jax.training.clips import load_clip_record
from pikastream_jax.training.dit_data import prepare_batch
from pikastream_jax.training.judge import HeldOut, Plan, speech_finder, student_sampler
from pikastream_jax.training.roll_out import Script, roll_out
from tests.small import randomised, small_config, small_models

CONFIG = small_config(height=64, width=64, chunk=3, window=3, steps=2)
PLAN = Plan(clips=4, latent_frames=9)


def test_sound_is_found_where_it_comes_from():
    corpus = small_corpus()
    track = speech_finder(corpus)(corpus.mel[17 * MEL_FRAMES : 26 * MEL_FRAMES], 4)
    wanted = dequantise_tracks(corpus.tracks[17 * 4 : 21 * 4])
    np.testing.assert_allclose(track.mouth_open, wanted.mouth_open, atol=1e-6)


def test_sound_of_another_corpus_is_refused():
    corpus = small_corpus()
    with pytest.raises(ValueError, match="--speech"):
        speech_finder(corpus)(255 - corpus.mel[:32], 2)
    with pytest.raises(ValueError, match="--speech"):
        speech_finder(corpus)(corpus.mel[5 : 5 + MEL_FRAMES], 1)  # not from the beginning of a latent frame


def conditions(config, frames=6):
    batch = prepare_batch(config, {"innovations": coded_constants(config)["innovations"]}, coded_batch(config, 2, frames), jax.random.key(0), train=False)
    # Pictures of about unit variance, and sound that differs from latent frame to latent frame.
    return dataclasses.replace(batch, reference=jax.random.normal(jax.random.key(1), batch.reference.shape))


@pytest.mark.slow
def test_a_student_streams_as_in_training():
    models, params = small_models(CONFIG)
    batch = conditions(CONFIG)
    noise = jax.random.normal(jax.random.key(2), batch.latents.shape)
    made = jax.jit(student_sampler(models))(params.denoiser, batch, noise)
    _, wanted, _ = jax.jit(functools.partial(roll_out, models))(params.denoiser, Script.of(batch, 3), noise)
    np.testing.assert_allclose(made, wanted, atol=1e-4)


@pytest.mark.slow
def test_a_rolling_student_hears_each_chunk_when_it_is_shown():
    """What changes in the sound of the last chunk cannot reach frames that have left before it was heard, and does reach its own."""
    config = small_config(height=64, width=64, chunk=3, window=3, steps=2, schedule="rolling")
    models, params = small_models(config)
    batch = conditions(config, 9)
    other = dataclasses.replace(batch, mel=jnp.asarray(batch.mel).at[:, 6:].add(0.5))
    noise = jax.random.normal(jax.random.key(2), batch.latents.shape)
    sample = jax.jit(student_sampler(models))
    one, two = sample(params.denoiser, batch, noise), sample(params.denoiser, other, noise)
    assert one.shape == noise.shape and bool(jnp.isfinite(one).all())
    different = jnp.abs(one - two).max(axis=(0, 2, 3, 4))
    assert float(different[:3].max()) == 0.0 and float(different[6:].min()) > 1e-3


def test_a_student_s_chunks_are_counted_as_the_engine_counts_them(monkeypatch):
    """Before a chunk is made those before it: by that number a rolling stream knows that what it writes first is no chunk yet, and keeps it out of the sink."""
    config = small_config(height=64, width=64, chunk=3, window=3, steps=2, schedule="rolling", sink=3)
    models, params = small_models(config)
    counted = []

    def denoise_chunk(models, params, state, conditions, noise):
        counted.append(np.asarray(state.chunk_count).tolist())
        return state, noise

    monkeypatch.setattr(judge, "denoise_chunk", denoise_chunk)
    batch = conditions(config, 9)
    with jax.disable_jit():
        student_sampler(models)(params.denoiser, batch, jnp.zeros(batch.latents.shape))
    assert counted == [[n, n] for n in range(3 + config.stream.delay)]


class Fake:
    """Reads the means of pictures where others read faces."""

    params = np.zeros(1)

    def __call__(self, frames):
        means = frames.reshape(len(frames), -1).mean(axis=1) / 255
        return Reading(**{field.name: np.repeat(means[:, None], 32, 1) if field.name == "identity" else means for field in dataclasses.fields(Reading)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Clips and runs of a preset; the weights are random and follow from the folder's name."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.PRESETS, "small", lambda: CONFIG)
        patch.setattr(compare, "load_corpus", lambda path: small_corpus())
        patch.setattr(compare, "Estimator", Fake)
        patch.setattr(compare, "calibrate", lambda *_: (None, IdentityMetric(np.eye(32))))
        patch.setattr(compare, "load_weights", weights_of)
        write_coded(root / "small" / "clips", CONFIG)
        (root / "small" / "vae_streaming").mkdir()
        for name, stage in {"dit_sft": "dit_sft", "dit_reward": "dit_reward", "dit_causal": "dit_causal", "dit_rolling": "dit_causal"}.items():
            (root / "small" / name).mkdir()
            settings = {"schedule": "rolling"} if name == "dit_rolling" else {}
            (root / "small" / name / "config.json").write_text(json.dumps({"stage": stage, "config": {"stage": settings}}))
        yield root


def weights_of(path, part=""):
    models, params = small_models(CONFIG)
    return params.flash_vae if path.name == "vae_streaming" else randomised(models.denoiser.abstract, len(path.name))


@pytest.fixture
def command(runs, monkeypatch, capsys):
    def run(*arguments):
        given = ["compare", "--config", "small", "--root", str(runs), *arguments]
        if "--clips" not in given:
            given += ["--clips", "4"]
        monkeypatch.setattr(sys, "argv", given)
        code = compare.main()
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def test_teachers_are_compared_pair_by_pair_and_judged_once(runs, command, monkeypatch):
    code, out, err = command("--runs", "dit_sft@2", "dit_reward@2", "--distance")
    assert code == 0, err
    assert "dit_sft@2 against dit_reward@2" in out and "identity_distance" in out and "no rewards" in out and "velocities of" in out
    result = json.loads((runs / "small" / "judged" / "comparison.json").read_text())["against"]["dit_reward@2"]
    assert result["identity_distance"]["pairs"] == 4 and result["velocity_distance"]["mean"] > 0
    monkeypatch.setattr(compare.Judge, "judge", lambda *_: pytest.fail("judged again"))
    assert command("--runs", "dit_sft@2", "dit_reward@2")[1].splitlines()[:5] == out.splitlines()[:5]


def test_a_judgement_that_could_not_be_kept_whole_is_not_kept(runs, command, monkeypatch):
    def half(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", half)
    code, _, err = command("--runs", "dit_sft@3", "truth")
    assert code == 1 and "disk full" in err and not (runs / "small" / "judged" / "dit_sft@3.npz").exists()
    monkeypatch.undo()


def test_truth_is_a_contestant_and_equals_itself(command):
    code, out, err = command("--runs", "truth", "truth")
    assert code == 0, err
    assert [line.split()[-1] for line in out.splitlines()[2:] if "fewer than 2" not in line and "rewards" not in line] == ["same"] * sum(
        line.endswith("same") for line in out.splitlines()
    )


def test_a_file_that_streams_is_judged_as_the_run_that_it_was_packed_from(runs, command, tmp_path):
    tokenizer, statistics = load_clip_record(runs / "small" / "clips", CONFIG.text.length)
    _, params = small_models(CONFIG)
    params = dataclasses.replace(params, denoiser=weights_of(runs / "small" / "dit_causal"), statistics=statistics)
    save_package(tmp_path / "packed.safetensors", CONFIG, params, tokenizer, {})
    code, _, err = command("--runs", "dit_causal", str(tmp_path / "packed.safetensors"))
    assert code == 0, err
    one, two = (dict(np.load(runs / "small" / "judged" / f"{name}.npz")) for name in ("dit_causal", "packed.safetensors"))
    assert one.pop("follows_from") != two.pop("follows_from")
    for name, values in one.items():
        np.testing.assert_allclose(values, two[name], rtol=0.05, atol=0.05, err_msg=name)  # packed weights are bfloat16
    other = dataclasses.replace(params, statistics=dataclasses.replace(statistics, mean=statistics.mean + 0.1))
    save_package(tmp_path / "other.safetensors", CONFIG, other, tokenizer, {})
    code, _, err = command("--runs", str(tmp_path / "other.safetensors"))
    assert code == 1 and "scale latents differently: make clips with --like" in err
    fewer = dataclasses.replace(CONFIG, stream=dataclasses.replace(CONFIG.stream, steps=1))
    save_package(tmp_path / "fewer.safetensors", fewer, params, tokenizer, {})
    for name, steps in (("fewer.safetensors", 1), ("fewer.safetensors@3", 3), ("packed.safetensors", CONFIG.stream.steps)):
        one = compare.contestant(str(tmp_path / name), CONFIG, runs / "small", 50, compare.Guidance())
        assert one.models.config.stream.steps == one.way["stream"]["steps"] == steps, name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--runs", "dit_gone"], "no run 'dit_gone'"),
        (["--runs", "dit_causal@65"], "steps 65 must lie in 1-64"),
        (["--runs", "dit_sft@many"], "no number of steps"),
        (["--runs", "clips"], "no run 'clips'"),
        (["--runs", "truth", "--clips", "5"], "holds 4 clips out, 5 are asked for"),
        (["--runs", "truth", "--clips", "1"], "at least 2"),
        (["--runs", "truth", "--latent-frames", "13"], "windows of 13 latent frames"),
        (["--runs", "truth", "--latent-frames", "4"], "at least 7"),
        (["--runs", "truth", "--config", "huge"], "no preset is called 'huge'"),
        (["--runs", "dit_sft", "dit_causal", "--distance", "--steps", "1"], "dit_causal is none"),
    ],
)
def test_bad_input_is_one_line(command, arguments, said):
    code, _, err = command(*arguments)
    assert code == 1 and err.startswith("compare: ") and said in err and err.count("\n") == 1


def test_a_student_is_judged_in_the_schedule_of_its_run(runs):
    student = compare.contestant("dit_rolling", CONFIG, runs / "small", 50, compare.Guidance())
    assert student.models.config.stream.schedule == "rolling" and not student.teacher
    other = compare.contestant("dit_rolling@1", CONFIG, runs / "small", 50, compare.Guidance())
    assert other.models.config.stream == dataclasses.replace(student.models.config.stream, steps=1)


def test_noise_and_conditions_are_the_same_for_all(runs):
    one, two = (list(HeldOut(CONFIG, runs / "small" / "clips", small_corpus(), PLAN).batches()) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    other = next(HeldOut(CONFIG, runs / "small" / "clips", small_corpus(), dataclasses.replace(PLAN, seed=1)).batches())
    assert (other[1] != one[0][1]).any()
