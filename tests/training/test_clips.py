"""Clips for the DiT's stages: encoded as the stream encodes, written and read back, captions and sound with them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_corpus import small_corpus

import configs
from pikastream_jax.data.corpus import MEL_FRAMES, save_corpus
from pikastream_jax.data.face import FaceState
from pikastream_jax.measuring.estimator import COLUMNS, READERS
from pikastream_jax.measuring.lipsync import CLOSED
from pikastream_jax.training import clips
from pikastream_jax.training.records import Records, read_constants, read_record
from pikastream_jax.weights import safetensors_io
from tests.small import small_config, small_models

CONFIG = small_config(width=48)  # square, as the renderer draws
FRAMES, COUNT, HELD_OUT = 4, 3, 2


def test_a_clip_is_encoded_as_the_whole_video_is(monkeypatch):
    """Latent frame by latent frame equals all at once; boxes are the mean over a latent frame; a still is equal frames."""
    rng = np.random.default_rng(0)
    pictures = jnp.asarray(
        rng.uniform(-1, 1, (13, 48, 48, 3)), jnp.float32
    )  # "drawn" by number; the last is the reference
    monkeypatch.setattr(clips, "render", lambda identity, state, size: pictures[state.yaw.astype(int)])
    monkeypatch.setattr(
        clips, "mouth_box", lambda identity, state, size: state.yaw + jnp.array([0.0, 10.0, 20.0, 30.0])
    )
    monkeypatch.setattr(clips, "eyes_box", lambda identity, state, size: 2 * state.yaw + jnp.zeros(4))
    models, params = small_models(CONFIG)
    states = FaceState(**{field.name: jnp.arange(12.0) for field in dataclasses.fields(FaceState)})
    reference = jax.tree.map(lambda leaf: jnp.full_like(leaf[0], 12.0), states)

    @jax.jit
    def both(params):
        vae = models.flash_vae.bind(params)
        still = jnp.broadcast_to(pictures[12], (1, 4, 48, 48, 3))
        return (
            jax.tree.map(lambda leaf: leaf[0], clips.encode_clips(CONFIG, vae, None, *jax.tree.map(lambda leaf: leaf[None], (states, reference)))),
            vae.encode(pictures[None, :12])[0][0],
            vae.encode(still)[0][0, 0],
        )

    (latents, at_rest, boxes, middle), whole, alone = both(params.flash_vae)
    assert latents.shape == (3, 6, 6, 4) and np.std(whole) > 0.1
    np.testing.assert_allclose(latents, whole, atol=1e-4)
    np.testing.assert_allclose(at_rest, alone, atol=1e-4)
    assert boxes[:, 0].tolist() == [[1.5, 11.5, 21.5, 31.5], [5.5, 15.5, 25.5, 35.5], [9.5, 19.5, 29.5, 39.5]]
    assert boxes[:, 1, 0].tolist() == [3.0, 11.0, 19.0]
    np.testing.assert_array_equal(middle, pictures[4:8])


def test_reconstruction_by_hand():
    """The middle one of five latent frames is decoded with the two before it, and wrong in one of the boxes."""
    middle = np.zeros((1, 4, 48, 48, 3), np.float32)
    wrong = np.full_like(middle, 9.0)  # outside of the boxes nothing counts
    wrong[:, :, 10:20, 10:20], wrong[:, :, 30:34, 5:40] = 0.2, 0.0
    boxes = np.zeros((1, 5, 2, 4))
    boxes[:, 2] = [[10, 10, 20, 20], [30, 5, 34, 40]]
    asked = []

    def decode(latents):
        asked.append(latents[0, :, 0, 0, 0].tolist())
        return np.concatenate([np.zeros((1, 8, 48, 48, 3)), wrong], axis=1)

    vae = types.SimpleNamespace(config=CONFIG.flash_vae, decode=decode)
    latents = np.arange(5.0)[None, :, None, None, None]
    mean = 0.04 * 100 / 240  # of the 240 pixels in the boxes 100 are wrong
    np.testing.assert_allclose(clips.reconstruction(vae, latents, boxes, middle), 10 * np.log10(4 / mean), rtol=1e-4)
    assert asked == [[0, 1, 2]]


def test_a_reference_is_a_face_at_rest():
    states = jax.vmap(clips.reference_state)(jax.random.split(jax.random.key(0), 200))
    limits = {"yaw": 0.12, "pitch": 0.06, "roll": 0.06, "gaze_x": 0.15, "gaze_y": 0.1}
    for field in dataclasses.fields(FaceState):
        value = np.asarray(getattr(states, field.name))
        if field.name in limits:
            assert (
                0.8 * limits[field.name] < np.abs(value).max() <= limits[field.name] and value.min() < 0 < value.max()
            )
        elif field.name == "smile":
            assert value.min() >= 0 and value.max() <= 0.5
        else:
            assert (value == 0).all(), "mouth closed, eyes open, nothing else moves"


def sketch(identity, state, size):
    """Stands for the renderer, which takes long to compile: waves set by the person, moved by the head and the mouth."""
    y, x = jnp.meshgrid(jnp.linspace(-3, 3, size), jnp.linspace(-3, 3, size), indexing="ij")
    person = jnp.stack([identity.eye_y, identity.mouth_size, identity.head_height]) * 40
    return jnp.sin(x[..., None] * (1 + state.mouth_open) + y[..., None] + person + 5 * state.yaw)


def command(patch, folder, out, *more):
    """Runs the command on the small preset, with the corpus and the weights of `folder`."""
    arguments = ["clips", "--flash-vae", folder / "vae.safetensors", "--out", out, "--speech", folder / "speech.npz"]
    arguments += ["--config", "small", "--count", COUNT, "--held-out", HELD_OUT, "--latent-frames", FRAMES, "--shard", 2, *more]
    patch.setitem(configs.PRESETS, "small", lambda: CONFIG)
    patch.setattr(clips, "render", sketch)
    patch.setattr("sys.argv", [str(argument) for argument in arguments])
    return clips.main()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    save_corpus(folder / "speech.npz", small_corpus())
    safetensors_io.save(folder / "vae.safetensors", small_models(CONFIG)[1].flash_vae, dtype=jnp.float32)
    return folder


@pytest.fixture(scope="module")
def made(inputs):
    """Made by the command itself."""
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, inputs, inputs / "new" / "clips", "--seed", 5) == 0
    return inputs / "new" / "clips"


def read(folder, split):
    records = Records(folder, split)
    return [records[number] for number in range(len(records))]


@pytest.mark.parametrize(("split", "count"), [("train", COUNT), ("held_out", HELD_OUT)])
def test_a_split_is_read_back_whole(made, split, count):
    rows = read(made, split)
    assert len(rows) == count
    sounds = [small_corpus().mel[MEL_FRAMES * start :][: MEL_FRAMES * FRAMES] for start in small_corpus().starts(split, FRAMES, MEL_FRAMES)]
    for row in rows:
        assert row["latents"].shape == (FRAMES, 6, 6, 4) and row["latents"].dtype == np.float16
        assert row["opening"].shape == (FRAMES, 4) and row["opening"].dtype == np.float16
        assert row["reference"].shape == (6, 6, 4) and row["boxes"].shape == (FRAMES, 2, 4)
        assert np.isfinite(row["latents"]).all() and (row["boxes"] >= 0).all() and (row["boxes"] <= 48).all()
        assert row["tokens"].shape == (2, CONFIG.text.length) and (row["valid"] > 1).all(), "every clip has a caption"
        assert any(np.array_equal(row["mel"], sound) for sound in sounds), "its sound is one stretch of a recording of its split"


def test_captions_change_once_or_not_at_all(inputs, made):
    """Where the second is never followed, it is the first."""
    rows = read(made, "train") + read(made, "held_out")
    for row in rows:
        assert (np.diff(row["frame_prompt"]) >= 0).all() and row["frame_prompt"][0] == 0 and set(row["frame_prompt"]) <= {0, 1}
        if not row["frame_prompt"].any():
            assert (row["tokens"][0] == row["tokens"][1]).all()


def test_training_latents_are_normalised_by_the_stored_statistics(made):
    _, statistics = clips.load_clip_record(made, CONFIG.text.length)
    flat = np.concatenate([row["latents"].astype(np.float64).reshape(-1, 4) for row in read(made, "train")])
    flat = np.asarray(statistics.normalise(flat))
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(flat.std(0), 1, atol=1e-4)


def test_the_truth_is_of_one_person_each(made):
    features = np.stack([row["truth"] for row in read(made, "train")])[..., COLUMNS == "identity"]
    assert np.ptp(features, axis=1).max() < 1e-5
    assert (np.abs(features[0, 0] - features[1, 0]) > 1e-3).all()


def test_the_opening_is_the_speech_s(made):
    corpus = small_corpus()
    mean, scale = READERS["mouth"].quantities["opening"]
    for row in read(made, "train"):
        start = int(row["mel"][0, 0])  # the corpus has the latent frame's number as its level
        opening = corpus.tracks[4 * start : 4 * (start + FRAMES), 0].reshape(FRAMES, 4) / 255
        np.testing.assert_allclose(row["opening"], opening, atol=5e-4)
        assert ((row["opening"] < CLOSED) == (opening < CLOSED)).all(), "float16 is fine enough for what counts as closed"
        np.testing.assert_allclose(row["truth"][:, list(COLUMNS).index("opening")] * scale + mean, opening.mean(axis=1), atol=1e-4)


def test_people_differ_and_faces_move(made):
    rows = read(made, "train") + read(made, "held_out")
    for number, row in enumerate(rows):
        assert (np.abs(np.diff(row["latents"].astype(np.float32), axis=0)).max(axis=(1, 2, 3)) > 1e-2).all()
        for other in rows[:number]:
            assert np.abs(row["reference"].astype(np.float32) - other["reference"]).mean() > 0.02


def test_the_record_says_how_the_clips_were_made(made):
    tokenizer, _ = clips.load_clip_record(made, CONFIG.text.length)
    assert tokenizer.length == CONFIG.text.length and tokenizer.size <= CONFIG.text.vocabulary
    assert max(row["tokens"].max() for row in read(made, "train")) < tokenizer.size
    told = read_record(made)["made_with"]
    assert told["seed"] == 5 and told["config"] == "small" and told["words"] == list(tokenizer.words)
    assert read_constants(made)["quality"].shape == (COUNT,)


@pytest.mark.slow
def test_clips_are_a_function_of_the_seed_however_many_are_drawn_at_a_time(inputs, made, monkeypatch):
    assert command(monkeypatch, inputs, inputs / "together", "--seed", 5, "--batch", 3) == 0
    assert command(monkeypatch, inputs, inputs / "other", "--seed", 6) == 0
    for row, again, other in zip(*(read(folder, "train") for folder in (made, inputs / "together", inputs / "other")), strict=True):
        for name, value in row.items():
            np.testing.assert_allclose(value.astype(np.float64), again[name], atol=2e-2, err_msg=name)
        assert np.abs(row["latents"] - other["latents"]).max() > 0.1


def test_quality_is_the_worst_rank():
    """Four clips, two measures: 1 is best at the first and worst at the second."""
    measures = np.array([[1.0, 9.0], [4.0, 6.0], [2.0, 8.0], [3.0, 7.0]])
    np.testing.assert_allclose(clips.quality(measures), [0.25, 0.25, 0.5, 0.5])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config", "huge"), "no preset is called 'huge'"),
        (("--latent-frames", 3), "--latent-frames 3 must be at least 4"),
        (("--batch", 0), "--batch 0 must be at least 1"),
        (("--flash-vae", "nowhere"), "nowhere"),
        (("--speech", "nowhere.npz"), "no speech features at nowhere.npz"),
        (("--shard", 0), "shard=0 records must be at least 1"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_1(inputs, monkeypatch, tmp_path, capsys, flags, message):
    assert command(monkeypatch, inputs, tmp_path / "clips", *flags) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("clips: ") and message in line
    assert not (tmp_path / "clips").exists()


def test_statistics_are_kept_where_training_goes_on_from_a_file_that_streams(inputs, made, monkeypatch, capsys, tmp_path):
    kept = {"mean": jnp.arange(4.0), "std": jnp.arange(4.0) + 1}
    safetensors_io.save(tmp_path / "streams.safetensors", {"statistics": kept}, dtype=jnp.float32)
    assert command(monkeypatch, inputs, tmp_path / "clips", "--seed", 5, "--like", tmp_path / "streams.safetensors") == 0
    constants, fresh = read_constants(tmp_path / "clips"), read_constants(made)
    assert constants["statistics.mean"].tolist() == [0, 1, 2, 3] and constants["statistics.std"].tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(constants["quality"], fresh["quality"])
    assert command(monkeypatch, inputs, tmp_path / "clips", "--seed", 5) == 1, "with statistics of its own these are other clips"
    assert "statistics" in capsys.readouterr().err
    assert command(monkeypatch, inputs, tmp_path / "more", "--like", inputs / "vae.safetensors") == 1
    assert "its latent statistics have shape ()" in capsys.readouterr().err


def test_another_seed_does_not_go_on_with_the_same_folder(inputs, made, monkeypatch, capsys):
    before = (made / "record.json").read_bytes()
    assert command(monkeypatch, inputs, made, "--seed", 7) == 1
    assert "seed" in capsys.readouterr().err and (made / "record.json").read_bytes() == before
