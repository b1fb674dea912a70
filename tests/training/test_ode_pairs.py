"""Trajectories: what is stored of them, what the student is asked of them, and that every objective of `dit_causal` trains."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coded_clips import coded_batch, coded_constants, write_coded

import configs
from pikastream_jax.diffusion.flow import solver_timesteps
from pikastream_jax.training import dit_causal, ode_pairs
from pikastream_jax.training.dit_data import prepare_batch
from pikastream_jax.training.latent_reader import reader_model
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.records import Records, read_record
from pikastream_jax.training.two_copies import Trajectory, stream_chunks, two_copies
from pikastream_jax.weights import safetensors_io
from tests.small import copied, randomised, small_config, small_models

CONFIG = small_config(chunk=2, window=4, steps=2)
TIMES = solver_timesteps(2, CONFIG.stream.shift)
FRAMES = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, a reader and clips as `train.py` finds them."""
    folder = tmp_path_factory.mktemp("runs")
    safetensors_io.save(folder / "dit_sft", small_models(CONFIG)[1].denoiser, dtype=jnp.float32)
    safetensors_io.save(folder / "latent_reader", randomised(reader_model(CONFIG).abstract, 0), dtype=jnp.float32)
    write_coded(folder / "clips", CONFIG)
    return folder


def command(patch, runs, *flags):
    patch.setitem(configs.PRESETS, "small", lambda: CONFIG)
    given = ["--config", "small", "--runs", runs, "--count", 3, "--held-out", 2, "--latent-frames", FRAMES, "--steps", 4, "--batch", 2, *flags]
    return ode_pairs.main([str(flag) for flag in given])


@pytest.fixture(scope="module")
def pairs(runs):
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, runs) == 0
    return runs / "ode_pairs"


def test_what_is_stored(pairs):
    """Noise at the first of the student's timesteps, an end that is no noise, the windows' own conditions; the folder says what made it."""
    told = read_record(pairs)["made_with"]
    assert told["timesteps"] == TIMES.tolist() and told["kind"] == "bidirectional" and told["config"] == "small"
    records = Records(pairs, "train")
    assert len(records) == 3 and len(Records(pairs, "held_out")) == 2
    for number in range(3):
        record = records[number]
        assert record["states"].shape[:2] == (3, FRAMES) and record["chunk"] == 0
        start = record["states"][0].astype(np.float64)
        assert abs(start.mean()) < 0.3 and abs(start.std() - 1) < 0.2
        assert np.isfinite(record["states"]).all() and np.abs(record["states"][0] - record["states"][-1]).max() > 0.1
    assert np.abs(records[0]["states"][0] - records[1]["states"][0]).max() > 1, "every trajectory has noise of its own"


def test_the_same_command_goes_on_and_another_is_refused(runs, pairs, monkeypatch, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in pairs.iterdir()}
    assert command(monkeypatch, runs) == 0
    assert {path.name: path.stat().st_mtime_ns for path in pairs.iterdir()} == before
    assert command(monkeypatch, runs, "--text", 3.5) == 1
    assert "text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config", "huge"), "no preset is called"),
        (("--teacher", "nowhere"), "nowhere"),
        (("--kind", "causal", "--out", "x"), "has no dit_causal_teacher"),
        (("--latent-frames", 13), "windows of 13 latent frames out of clips of 12"),
    ],
)
def test_what_is_wrong_is_one_line(runs, monkeypatch, tmp_path, capsys, flags, message):
    assert command(monkeypatch, runs, "--out", tmp_path / "pairs", *flags) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ode_pairs: ") and message in line


def test_what_the_student_is_asked_by_hand():
    """The query copy is the stored state at each chunk's timestep, and what is wanted is (state - end) / t."""
    rows = prepare_batch(CONFIG, coded_constants(CONFIG), coded_batch(CONFIG, 3, FRAMES), jax.random.key(0), train=False)
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(size=(3, *rows.latents.shape)), jnp.float32)
    rows = dataclasses.replace(rows, latents=states[-1])
    chunks = stream_chunks(CONFIG, 3, FRAMES)
    copies = two_copies(CONFIG, rows, jax.random.key(1), chunks, Trajectory(states, states[-2]))
    np.testing.assert_array_equal(copies.x[:, :FRAMES], states[-2])
    np.testing.assert_allclose(copies.t[:, :FRAMES], TIMES[1])
    t = np.asarray(copies.t_query)
    step = np.abs(t[..., None] - TIMES[:2]).argmin(-1)
    assert set(step.ravel()) == {0, 1} and (step[:, ::2] == step[:, 1::2]).all()
    for row, frame in np.ndindex(3, FRAMES):
        state = np.asarray(states[step[row, frame], row, frame])
        np.testing.assert_array_equal(copies.x[row, FRAMES + frame], state)
        wanted = (state - np.asarray(rows.latents[row, frame])) / t[row, frame]
        np.testing.assert_allclose(copies.query_noise[row, frame] - rows.latents[row, frame], wanted, atol=1e-4)


def test_pairs_come_back_as_they_were_solved(pairs):
    batch = ode_pairs.pair_batches(CONFIG, pairs, "held_out", 2, None)[0]
    prepare = jax.jit(functools.partial(ode_pairs.prepare_pairs, CONFIG, train=False))
    rows, trajectory, chunk = prepare(coded_constants(CONFIG) | {}, batch, jax.random.key(0))
    assert rows.latents.shape[2:4] == CONFIG.latent_grid, "whole pictures"
    np.testing.assert_allclose(rows.latents, batch.states[:, -1].astype(np.float32))
    np.testing.assert_allclose(trajectory.states, np.moveaxis(batch.states, 1, 0).astype(np.float32))
    np.testing.assert_allclose(trajectory.context, batch.states[:, -2].astype(np.float32), err_msg="where the last step starts")
    assert chunk.tolist() == [0, 0] and rows.keep_audio.all() and (rows.motion == batch.motion).all()
    other = dataclasses.replace(CONFIG, stream=dataclasses.replace(CONFIG.stream, shift=3.0))
    with pytest.raises(ValueError, match="trajectories of timesteps .* the student's is .*: make them anew"):
        ode_pairs.pair_batches(other, pairs, "train", 2, 0)


def test_trajectories_of_parts_of_pictures_are_refused(pairs, tmp_path):
    """As they were once made; a student would learn from them without a word, and draw the outer rows wrongly."""
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    told = json.loads((folder / "record.json").read_text())
    del told["made_with"]["latent_grid"]
    (folder / "record.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="trajectories of latent_grid unknown, the student's is .*: make them anew"):
        ode_pairs.pair_batches(CONFIG, folder, "train", 2, 0)


def test_trajectories_over_other_clips_are_refused(runs, pairs, tmp_path):
    """Clips made anew have another FlashVAE's latents; what was solved over the old ones lies there still."""
    ode_pairs.check_same_clips(pairs, runs / "clips")
    clips = write_coded(tmp_path / "clips", CONFIG, flash_vae="another")
    init = {"pairs": pairs, "clips": clips}
    with pytest.raises(ValueError, match="trajectories over other clips than .*clips .flash_vae differ.: delete it and make it anew"):
        dit_causal.build(CONFIG, 0, init, dit_causal.Settings())


def test_a_causal_teacher_is_given_true_latents_before_each_chunk_alone():
    """What the last chunk becomes hangs on the clip's latents before it; what the others become does not hang on the last chunk's."""
    models, params = small_models(CONFIG)
    rows = prepare_batch(CONFIG, coded_constants(CONFIG), coded_batch(CONFIG, 2, FRAMES), jax.random.key(0), train=False)
    rows = dataclasses.replace(rows, latents=jax.random.normal(jax.random.key(1), rows.latents.shape))
    settings = ode_pairs.Arguments(kind="causal", steps=2, text=1.0, audio=1.0, reference=1.0)

    @jax.jit
    def solve(latents):
        return ode_pairs.solve(CONFIG, models.denoiser, params.denoiser, dataclasses.replace(rows, latents=latents), jax.random.key(2), settings)

    states, chunk = solve(rows.latents)
    assert states.shape == (3, *rows.latents.shape) and set(chunk.tolist()) <= {1, 2}
    for row, size in enumerate(chunk.tolist()):
        last = FRAMES - size
        after, _ = solve(rows.latents.at[row, last:].add(1.0))
        np.testing.assert_array_equal(after, states, err_msg="nobody sees the last chunk's true latents")
        after, _ = solve(rows.latents.at[row, last - 1].add(1.0))
        moved = np.abs(after - states).max(axis=(0, 3, 4, 5))[row]
        assert (moved[:last] == 0).all() and (moved[last:] > 1e-4).all()


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("ode", {}),
        pytest.param("diffusion_forcing", {}, marks=pytest.mark.slow),
        pytest.param("data", {"schedule": "rolling", "latent_frames": 8}, marks=pytest.mark.slow),
    ],
)
def test_every_objective_trains(runs, pairs, objective, more):
    init = {"clips": runs / "clips", "reader": runs / "latent_reader", "denoiser": runs / "dit_sft", "pairs": pairs, "flash_vae": runs}
    optimiser = OptimiserConfig(learning_rate=1e-3, warmup_steps=0, muon=False)
    settings = dit_causal.Settings(updates=10, batch=2, objective=objective, optimiser=optimiser, **({"latent_frames": 4} | more))
    stage = dit_causal.build(CONFIG, 0, init, settings)
    state, data = copied(stage.init()), copied(stage.data())
    first = jax.tree.map(np.asarray, state.params)
    update, batches = jax.jit(stage.update), stage.batches()
    for step in range(2):
        state, metrics = update(state, jax.random.fold_in(jax.random.key(0), step), data, batches[step])
        state = dataclasses.replace(state, step=state.step + 1)
        assert all(np.isfinite(float(value)) for value in metrics.values())
    moved = safetensors_io.flatten(jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), state.params, first))
    assert moved["dit.head.projection.kernel"] > 0 == max(value for name, value in moved.items() if name.startswith("text."))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "objective ode needs trajectories"),
        ({"objective": "data", "schedule": "rolling", "latent_frames": 7}, "sequences of 7 latent frames are shorter than the 4 in flight"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dit_causal.build(CONFIG, 0, {}, dit_causal.Settings(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "rolling"}, "add --objective data"),
        ({"timesteps": "all"}, "timesteps all are for objective data"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        dit_causal.Settings(**settings)
