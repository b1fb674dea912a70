"""The latent reader: it looks where it is told, learns what is there, and the DiT pays for what is misread."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.data.face import neutral_state, sample_identity
from pikastream_jax.measuring.estimator import COLUMNS, READERS, true_readings
from pikastream_jax.nn.layers import initial_params
from pikastream_jax.training import latent_reader
from pikastream_jax.training.dit_data import ClipWindows, DiTBatch
from pikastream_jax.training.innovations import fit_innovations
from tests.small import small_config

CONFIG = small_config(height=128, width=128)  # 16 x 16 latents of 8 pixels
OUTPUTS = sum(reader.outputs for reader in READERS.values())
MODEL = latent_reader.reader_model(CONFIG)


@pytest.fixture(scope="module")
def params():
    return initial_params(lambda rngs: latent_reader.LatentReader(CONFIG, rngs=rngs), jax.random.key(0))


def batch_of(latents, boxes, truth, opening):
    b, f = latents.shape[:2]
    nothing = {field.name: jnp.zeros((b, f)) for field in dataclasses.fields(DiTBatch)}
    return DiTBatch(**nothing | {"latents": latents, "boxes": boxes, "truth": truth, "opening": opening})


def example(b=2, f=3, rows=12):
    rng = np.random.default_rng(0)
    middles = rng.uniform([50, 40], [60, 60], (b, f, 2, 2)) + [[[[20, 0], [-10, 0]]]]
    boxes = np.concatenate([middles - 8, middles + 8], axis=-1)
    latents = rng.normal(size=(b, f, rows, rows, CONFIG.dit.latent_channels))
    return tuple(jnp.asarray(x, jnp.float32) for x in (latents, boxes, rng.normal(size=(b, f, OUTPUTS))))


def test_truth_has_the_readers_order():
    """A state that smiles and turns differs from rest in those columns of mouth and whole, and in where things are."""
    identity, rest = sample_identity(jax.random.key(0)), neutral_state()
    changed = true_readings(identity, dataclasses.replace(rest, smile=jnp.float32(1.0), yaw=jnp.float32(0.2))) - true_readings(identity, rest)
    assert changed.shape == (OUTPUTS,)
    moved = set(COLUMNS[np.abs(np.asarray(changed)) > 1e-6])
    assert {"smile", "yaw"} <= moved <= {"smile", "yaw", "width", "mouth_x", "mouth_y", "eyes_x", "eyes_y"}
    smile = float(changed[COLUMNS == "smile"][0])
    assert smile == pytest.approx(1 / READERS["mouth"].quantities["smile"][1])


def test_it_looks_where_the_boxes_are(params):
    """Latents far from the mouth don't change what the mouth's reader says; the same face elsewhere reads the same."""
    latents, boxes, truth = example()
    read = jax.jit(lambda latents, boxes: MODEL.bind(params)(latents, boxes, truth))
    said = read(latents, boxes)
    assert said.readings.shape == (2, 3, OUTPUTS) and np.std(said.readings) > 0.1
    assert said.closed.shape == (2, 3, 4) and np.std(said.closed) > 0.1
    far = read(latents.at[:, :, :3].add(1.0), boxes)  # rows above the eyes
    mouth = slice(-READERS["mouth"].outputs, None)
    np.testing.assert_allclose(far.readings[..., mouth], said.readings[..., mouth], atol=1e-5)
    np.testing.assert_allclose(far.closed, said.closed, atol=1e-5)
    assert np.abs(far.readings - said.readings).max() > 0.01
    # Two latents to the right and one down, latents and boxes alike; a frame of zeros hides what leaves the picture.
    framed = jnp.pad(latents, ((0, 0), (0, 0), (6, 6), (6, 6), (0, 0)))
    here, there = boxes + 6 * 8, boxes + 6 * 8 + jnp.array([8.0, 16.0, 8.0, 16.0])
    moved, still = read(jnp.roll(framed, (1, 2), (2, 3)), there), read(framed, here)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), moved, still)


def test_misreading_by_hand(params):
    """The error is that of x_t - t v against the clean latents, and a right velocity costs nothing."""
    latents, boxes, truth = example()
    noise, velocity = jax.random.normal(jax.random.key(1), (2, *latents.shape))
    t = jnp.array([[1.0, 0.5, 0.1], [0.9, 0.3, 0.0]])
    opening = jnp.asarray(np.random.default_rng(1).uniform(0.0, 0.2, (2, 3, 4)), jnp.float32)
    reader, batch = MODEL.bind(params), batch_of(latents, boxes, truth, opening)
    result = latent_reader.misreading(reader, batch, velocity, noise, t)
    x_t = (1 - t[:, :, None, None, None]) * latents + t[:, :, None, None, None] * noise
    said = reader(x_t - t[:, :, None, None, None] * velocity, boxes, truth)
    error = np.asarray(said.readings - reader(latents, boxes, truth).readings) ** 2
    identity = COLUMNS == "identity"
    assert identity.sum() == 32
    np.testing.assert_allclose(result["identity"], error[..., identity].mean(), rtol=1e-4)
    expected = sum(share * error[..., list(COLUMNS).index(name)].mean() for name, share in latent_reader.EXPRESSION.items())
    np.testing.assert_allclose(result["expression"], expected, rtol=1e-4)
    assert sum(latent_reader.EXPRESSION.values()) == pytest.approx(1.0)
    chance = 1 / (1 + np.exp(-np.asarray(said.closed)))
    price = -np.log(np.where(np.asarray(opening) < 0.1, chance, 1 - chance))
    np.testing.assert_allclose(result["closures"], price.mean(), rtol=1e-4)
    right = latent_reader.misreading(reader, batch, noise - latents, noise, t)
    assert max(right["identity"], right["expression"]) < 1e-8


def test_closures_by_hand(params):
    """Logits 2, -1, 0 and 3 of lips that are closed, open, closed and, at 0.10 itself, open."""
    opening = jnp.array([[[0.04, 0.5, 0.0999, 0.1]]])
    said = latent_reader.Said(jnp.zeros((1, 1, OUTPUTS)), jnp.array([[[2.0, -1.0, 0.0, 3.0]]]))
    parts = latent_reader.reading_error(said, jnp.zeros((1, 1, OUTPUTS)), opening)
    assert parts["closures"] == pytest.approx((np.log1p(np.exp(-2)) + np.log1p(np.exp(-1)) + np.log(2) + np.log1p(np.exp(3))) / 4, rel=1e-5)
    assert parts["identity"] == parts["expression"] == 0
    # Two clips: of the first both closures are found, the second a frame late, of the second clip none, and one is made up.
    true = np.array([[[0.5, 0.05, 0.5, 0.5], [0.05, 0.05, 0.5, 0.5]], [[0.5, 0.05, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]], np.float16)
    logit = np.array([[[-1, 2, -1, -1], [-1, 3, -1, -1]], [[-1, -1, -1, -1], [-1, 1, -1, -1]]], np.float32)
    read = latent_reader.closures_read(logit, true)
    assert read == {"f1_closures": pytest.approx(2 * 2 / (3 + 3)), "closed_right": pytest.approx(13 / 16)}


def test_it_learns_and_is_told_nothing_that_it_should_say():
    """On four clips the error falls to less than half; of the truth's columns it sees the pose alone.

    Lips that are as the latents are then cost little, and much where the clip says the contrary.
    """
    stage = latent_reader.build(CONFIG, 0, {}, latent_reader.Settings(updates=80, batch=4, latent_frames=6, closures=1.0))
    b, length = 4, 6
    latents, boxes, truth = example(b, length, rows=16)
    opening = np.random.default_rng(1).uniform(0.0, 0.2, (b, length, 4)).astype(np.float16)
    batch = ClipWindows(
        latents=latents.astype(jnp.float16),
        reference=latents[:, 0].astype(jnp.float16),
        boxes=boxes,
        truth=truth,
        opening=opening,
        mel=np.zeros((b, 16 * (length - 1) + CONFIG.audio.mel_frames, CONFIG.audio.mels), np.uint8),
        tokens=np.zeros((b, 2, CONFIG.text.length), np.int32),
        valid=np.ones((b, 2), np.int32),
        frame_prompt=np.zeros((b, length), np.int32),
    )
    data = {"innovations": fit_innovations(np.asarray(truth))}
    update, state, losses = jax.jit(stage.update), stage.init(), []
    for step in range(70):
        state, metrics = update(state, jax.random.fold_in(jax.random.key(0), step), data, batch)
        state = dataclasses.replace(state, step=state.step + 1)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.5 * losses[0], losses
    reader = MODEL.bind(state.params)
    hidden = truth.at[..., ~np.isin(COLUMNS, latent_reader.TOLD)].set(0.0)
    jax.tree.map(np.testing.assert_array_equal, reader(latents, boxes, truth), reader(latents, boxes, hidden))
    noise, t = jax.random.normal(jax.random.key(1), latents.shape), jnp.ones((b, length))
    price = [
        latent_reader.misreading(reader, batch_of(latents, boxes, truth, lips), noise - latents, noise, t)["closures"]
        for lips in (jnp.asarray(opening), 0.2 - jnp.asarray(opening))
    ]
    assert price[0] < 0.4 and price[1] > 3 * price[0], price
