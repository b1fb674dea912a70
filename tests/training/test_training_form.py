"""A model traced once, scanned, rematerialised or in bfloat16 against the one that is written out in float32, as it is served."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.dit.block import DiTBlock
from pikastream_jax.dit.model import KeysValues
from pikastream_jax.training.training_form import Form, training_form
from pikastream_jax.weights.safetensors_io import flatten
from tests.small import small_config, small_models

CONFIG = small_config()
ROWS, COLUMNS = CONFIG.latent_grid
BATCH, FRAMES = 2, 4


def loss(form: Form | None, params, key):
    """Takes every path of the DiT that training takes: a sequence in two copies, and a chunk that reads a cache and gives back keys and values."""
    served = small_models(CONFIG)[0].denoiser
    denoiser = (served if form is None else training_form(served, form)).bind(params)
    draw = functools.partial(jax.random.normal, key)
    tokens = jnp.array([[[1, 5, 9, 0, 0, 0]]] * BATCH)
    text, valid = denoiser.text_conditions(tokens, jnp.full((BATCH, 1), 3))
    audio = draw((BATCH, 2 * FRAMES, CONFIG.audio.mel_frames, CONFIG.audio.mels))
    conditions = denoiser.conditions(text, valid, audio, draw((BATCH, 2 * FRAMES, CONFIG.dit.motion)), jnp.array([True, False]))
    reference = denoiser.dit.reference_keys_values(draw((BATCH, ROWS, COLUMNS, 4)))
    latents = draw((BATCH, 2 * FRAMES, ROWS, COLUMNS, 4))
    sequence = denoiser.dit.forward_sequence(
        latents,
        jnp.full((BATCH, 2 * FRAMES), 0.7),
        conditions,
        reference,
        chunk_ids=jnp.array([[0, 0, 1, 1]] * BATCH),
        window=2,
        reference_distance=jnp.full(BATCH, 8.0),
        copies=2,
    )
    n = CONFIG.tokens_per_frame
    audio = jax.tree.map(lambda leaf: leaf[:, :, :2], conditions.audio)
    chunk, own = denoiser.dit.forward_chunk(
        latents[:, :2],
        jnp.full((BATCH, 2), 0.7),
        dataclasses.replace(conditions, audio=audio, motion=conditions.motion[:, :2]),
        KeysValues(reference.k, reference.v),
        fixed_slots=n,
        fixed_valid=jnp.full(BATCH, n),
        ring_valid=jnp.zeros(BATCH, jnp.int32),
        kept=1,
    )
    parts = (sequence, chunk, own.k, own.v)
    return sum(jnp.mean(jnp.sin(part.astype(jnp.float32))) for part in parts), (sequence, own)


@functools.cache
def result(form: Form | None):
    params = small_models(CONFIG)[1].denoiser
    (value, (sequence, own)), gradient = jax.jit(jax.value_and_grad(functools.partial(loss, form), has_aux=True))(params, jax.random.key(3))
    return value, sequence, own, flatten(gradient)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(Form(), id="traced once"),
        pytest.param(Form(layers="scan", rematerialise="full"), id="scan"),
        pytest.param(Form(rematerialise="dots"), id="rematerialised", marks=pytest.mark.slow),
    ],
)
def test_the_form_changes_no_number(form):
    value, sequence, own, gradient = result(form)
    expected_value, expected_sequence, expected_own, expected = result(None)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-5)
    np.testing.assert_allclose(sequence, expected_sequence, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), own, expected_own)
    assert gradient.keys() == expected.keys(), "one array per parameter and block, as in files"
    for name, leaf in expected.items():
        assert np.abs(leaf).max() > 0, f"{name} takes no part, so that equality says nothing"
        np.testing.assert_allclose(gradient[name], leaf, atol=1e-5 * np.abs(leaf).max() + 1e-8, err_msg=name)


@pytest.mark.parametrize(("form", "times"), [(None, CONFIG.dit.blocks), (Form(), 1), (Form(layers="scan"), 1)], ids=str)
def test_blocks_are_traced_once_in_training(form, times, monkeypatch):
    """For each of the three ways through them; a program of many passes is else traced for longer than it trains."""
    traced = []
    whole = DiTBlock.__call__
    monkeypatch.setattr(DiTBlock, "__call__", lambda *given: traced.append(1) or whole(*given))
    jax.eval_shape(functools.partial(loss, form), small_models(CONFIG)[1].denoiser, jax.random.key(3))
    assert CONFIG.dit.blocks > 1 and len(traced) == 3 * times


def test_bfloat16_computes_low_and_keeps_high():
    """Random weights, whose errors nothing damps: the gradient points the same way; it comes out in float32."""
    value, sequence, own, gradient = result(Form(precision="bfloat16", layers="scan", rematerialise="full"))
    _, expected_sequence, _, expected = result(None)
    assert own.k.dtype == jnp.bfloat16 and sequence.dtype == jnp.float32
    assert {leaf.dtype for leaf in gradient.values()} == {jnp.dtype(jnp.float32)}
    assert np.abs(sequence - expected_sequence).mean() < 0.03 * np.abs(expected_sequence).mean()
    ours, theirs = (np.concatenate([np.ravel(grads[name]) for name in expected]) for grads in (gradient, expected))
    assert ours @ theirs > 0.99 * np.linalg.norm(ours) * np.linalg.norm(theirs)


def test_what_is_kept_for_the_backward_pass():
    """Counted without running anything: everything, products with weights, or the blocks' inputs."""
    params = small_models(CONFIG)[1].denoiser

    def kept(form):
        residuals = jax.eval_shape(lambda params: jax.vjp(lambda p: loss(form, p, jax.random.key(0))[0], params)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    everything, dots, inputs = (kept(Form(layers="scan", rematerialise=name)) for name in ("none", "dots", "full"))
    assert inputs < 0.9 * dots < 0.8 * everything
    assert kept(Form("bfloat16", "scan", "none")) < 0.8 * everything


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="precision 'float16' is not one of float32, bfloat16"):
        Form(precision="float16")
    with pytest.raises(ValueError, match="layers 'scan'.*only stages of the DiT take these"):
        training_form(small_models(CONFIG)[0].flash_vae, Form(layers="scan"))
