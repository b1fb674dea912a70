"""Clips for the DiT's stages: encoded as the stream encodes, written and read back, captions and sound with them."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from small_corpus import small_corpus

import configs
from pikastream_jax.data.corpus import save_corpus, window
from pikastream_jax.data.face import FaceState
from pikastream_jax.measuring.estimator import COLUMNS, READERS
from pikastream_jax.training import clips
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
            clips.encode_clip(CONFIG, vae, None, states, reference),
            vae.encode(pictures[None, :12])[0][0],
            vae.encode(still)[0][0, 0],
        )

    (latents, at_rest, boxes), whole, alone = both(params.flash_vae)
    assert latents.shape == (3, 6, 6, 4) and np.std(whole) > 0.1
    np.testing.assert_allclose(latents, whole, atol=1e-4)
    np.testing.assert_allclose(at_rest, alone, atol=1e-4)
    assert boxes[:, 0].tolist() == [[1.5, 11.5, 21.5, 31.5], [5.5, 15.5, 25.5, 35.5], [9.5, 19.5, 29.5, 39.5]]
    assert boxes[:, 1, 0].tolist() == [3.0, 11.0, 19.0]


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


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Made by the command itself, from a corpus and weights on disk."""
    folder = tmp_path_factory.mktemp("clips")
    save_corpus(folder / "speech.npz", small_corpus())
    safetensors_io.save(folder / "vae.safetensors", small_models(CONFIG)[1].flash_vae, dtype=jnp.float32)
    out = folder / "new" / "clips.safetensors"
    arguments = ["clips", "--flash-vae", folder / "vae.safetensors", "--out", out, "--speech", folder / "speech.npz"]
    arguments += ["--config", "small", "--count", COUNT, "--latent-frames", FRAMES, "--seed", 5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.PRESETS, "small", lambda: CONFIG)
        patch.setattr(clips, "HELD_OUT_CLIPS", HELD_OUT)
        patch.setattr(clips, "render", sketch)
        patch.setattr("sys.argv", [str(argument) for argument in arguments])
        clips.main()
    return out


@pytest.mark.parametrize(("split", "count"), [("train", COUNT), ("held_out", HELD_OUT)])
def test_a_split_is_read_back_whole(file, split, count):
    made = clips.load_clips(file, split)
    assert made.latents.shape == (count, FRAMES, 6, 6, 4) and made.latents.dtype == np.float16
    assert made.reference.shape == (count, 6, 6, 4) and made.boxes.shape == (count, FRAMES, 2, 4)
    assert np.isfinite(made.latents).all() and np.isfinite(made.boxes).all()
    assert (made.boxes >= 0).all() and (made.boxes <= 48).all()
    assert made.tokens.shape == (count, CONFIG.text.length) and (made.valid > 1).all(), "every clip has a caption"
    assert set(made.speech_start) <= set(small_corpus().starts(split, FRAMES, CONFIG.audio.mel_frames))


def test_training_latents_are_normalised_by_the_stored_statistics(file):
    made = clips.load_clips(file, "train")
    _, statistics = clips.load_clip_record(file, CONFIG.text.length)
    flat = made.latents.astype(np.float64).reshape(-1, 4)
    np.testing.assert_allclose(flat.mean(0), 0, atol=5e-3)
    np.testing.assert_allclose(flat.std(0), 1, atol=5e-3)
    with safetensors.safe_open(file, framework="numpy") as stored:
        np.testing.assert_array_equal(stored.get_tensor("statistics.std"), statistics.std)
    assert (statistics.std > 1e-3).all() and np.abs(np.asarray(statistics.mean)).max() > 1e-3


def test_the_truth_is_that_of_the_clips_own_sound_and_people(file):
    """The opening is the speech's, mean over a latent frame; a person's features stay, and are another's than the next one's."""
    made, corpus = clips.load_clips(file, "train"), small_corpus()
    columns = list(COLUMNS)
    mean, scale = READERS["mouth"].quantities["opening"]
    for truth, start in zip(made.truth, made.speech_start, strict=True):
        _, speech = window(jnp.asarray(corpus.mel), jnp.asarray(corpus.tracks), start, FRAMES, CONFIG.audio.mel_frames)
        opening = np.asarray(speech.mouth_open).reshape(FRAMES, 4).mean(axis=1)
        np.testing.assert_allclose(truth[:, columns.index("opening")] * scale + mean, opening, atol=1e-5)
    features = made.truth[..., COLUMNS == "identity"]
    assert np.ptp(features, axis=1).max() < 1e-5
    assert (np.abs(features[0, 0] - features[1, 0]) > 1e-3).all()


def test_people_and_motion_differ_and_faces_move(file):
    made, held_out = clips.load_clips(file, "train"), clips.load_clips(file, "held_out")
    people = np.concatenate([made.reference, held_out.reference]).astype(np.float32)
    for first in range(len(people)):
        for second in range(first):
            assert np.abs(people[first] - people[second]).mean() > 0.05
    assert (np.abs(np.diff(made.latents.astype(np.float32), axis=1)).max(axis=(1, 2, 3, 4)) > 1e-2).all()


def test_a_file_of_another_kind_is_named_with_what_it_lacks(file, tmp_path):
    with safetensors.safe_open(file, framework="numpy") as stored:
        arrays = {key: stored.get_tensor(key) for key in stored.keys() if not key.endswith(".truth")}  # noqa: SIM118 (no iterator)
    safetensors.numpy.save_file(arrays, tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match=r"old.safetensors lacks train.truth: make the clips anew"):
        clips.load_clips(tmp_path / "old.safetensors", "train")


def test_the_record_says_how_the_clips_were_made(file):
    tokenizer, _ = clips.load_clip_record(file, CONFIG.text.length)
    assert tokenizer.length == CONFIG.text.length and tokenizer.size <= CONFIG.text.vocabulary
    assert clips.load_clips(file, "train").tokens.max() < tokenizer.size
    with safetensors.safe_open(file, framework="numpy") as stored:
        record = json.loads(stored.metadata()["clips"])
    assert record["seed"] == 5 and record["config"] == "small" and record["flash_vae"].endswith("vae.safetensors")
    assert record["words"] == list(tokenizer.words)


def test_clips_are_a_function_of_the_seed(monkeypatch):
    """Without drawing: what was asked to be drawn is recorded."""
    monkeypatch.setattr(
        clips,
        "encode_clip",
        lambda config, vae, identity, states, reference: (states.yaw, reference.yaw, identity.eye_y),
    )
    model = types.SimpleNamespace(bind=lambda params: None)
    corpus = small_corpus()
    starts = corpus.starts("train", FRAMES, CONFIG.audio.mel_frames)

    def draw(seed):
        return clips.make_clips(CONFIG, model, {}, corpus, starts, COUNT, FRAMES, seed)

    (first, captions), (again, same), (other, others) = draw(1), draw(1), draw(2)
    assert captions == same and captions != others
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
    assert first["latents"].shape == (COUNT, 4 * FRAMES)
    assert all((first[name] != other[name]).any() for name in ("latents", "reference", "boxes", "speech_start"))
    assert len(set(first["reference"])) == COUNT
