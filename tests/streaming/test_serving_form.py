"""The models in serving form against the trained ones: the same numbers where only the arrangement differs, near ones where precision does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.nn.layers import parameter_count
from pikastream_jax.streaming.serving_form import serving_models, serving_params
from pikastream_jax.streaming.state import init_state, install_prompt, install_reference
from pikastream_jax.streaming.step import Models, generate_step
from tests.small import small_config, small_models
from tests.streaming.test_step import inputs

BATCH, CHUNKS = 2, 4


def stream(config, models, params):
    """Frames of a few chunks with a face and a prompt."""

    @jax.jit
    def start(params):
        denoiser = models.denoiser.bind(params.denoiser)
        reference = jax.random.normal(jax.random.key(0), (BATCH, *config.latent_grid, 4))
        tokens = jnp.array([[[1, 5, 9, 0, 0, 0]]] * BATCH)
        state = install_reference(init_state(config, BATCH), denoiser.dit.reference_keys_values(reference))
        return install_prompt(state, *denoiser.text_conditions(tokens, jnp.full((BATCH, 1), 3)))

    state, step, frames = start(params), jax.jit(functools.partial(generate_step, models), donate_argnums=1), []
    for chunk in range(CHUNKS):
        state, video = step(params, state, inputs(config, chunk))
        frames.append(np.asarray(video))
    assert step._cache_size() == 1
    return np.concatenate(frames, axis=1).astype(float), state


@functools.cache
def served(precision, **stream_fields):
    config = small_config(precision=precision)
    trained, params = small_models(small_config())
    trained = Models(config, trained.denoiser, trained.flash_vae)
    return config, serving_models(trained), serving_params(trained, params)


def test_fused_projections_give_the_same_frames():
    config, models, params = served("float32")
    trained, original = small_models(small_config())
    assert "qkv" in models.denoiser.abstract["dit"]["blocks"][0]["self_attention"]
    assert parameter_count(models.denoiser.abstract) == parameter_count(trained.denoiser.abstract)
    expected, _ = stream(small_config(), trained, original)
    found, _ = stream(config, models, params)
    assert expected.std() > 10 and np.abs(found - expected).max() <= 1


@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 0.03), ("float8", 0.15)])
def test_lower_precision_gives_nearly_the_same_frames(precision, limit):
    """Random weights, whose errors nothing damps; what it does to trained ones is in docs/performance.md."""
    config, models, params = served(precision)
    found, state = stream(config, models, params)
    expected, _ = stream(*(served("float32")))
    assert state.dit_k.dtype == state.vae.k.dtype == jnp.bfloat16
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean())
    assert 0 < error < limit


def test_shapes_and_dtypes_of_the_abstract_form_are_the_real_ones():
    for precision in ("bfloat16", "float8"):
        _, models, params = served(precision)
        for abstract, real in ((models.denoiser.abstract, params.denoiser), (models.flash_vae.abstract, params.flash_vae)):
            described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract)
            assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), real)


def test_float8_is_for_the_products_of_a_denoising_step():
    _, models, _ = served("float8")
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(models.denoiser.abstract)}
    eighth = {name for name, leaf in flat.items() if leaf.dtype == jnp.float8_e4m3fn}
    parts = ["self_attention']['qkv", "self_attention']['o", "mlp']['up", "mlp']['down"]
    parts += [f"{kind}_attention']['{name}" for kind in ("text", "audio") for name in "qo"]
    assert eighth == {f"['dit']['blocks'][{i}]['{part}']['kernel']" for i in range(2) for part in parts}
    assert {leaf.dtype.name for name, leaf in flat.items() if name not in eighth} == {"bfloat16", "float32"}
    assert all(name.endswith("['scale']") for name, leaf in flat.items() if leaf.dtype == jnp.float32)


def test_weights_that_stay_as_they_are_are_not_copied():
    trained, params = small_models(small_config())
    kept = serving_params(trained, params)
    ours, theirs = kept.denoiser["dit"]["blocks"][0]["mlp"]["up"], params.denoiser["dit"]["blocks"][0]["mlp"]["up"]
    assert ours["kernel"].unsafe_buffer_pointer() == theirs["kernel"].unsafe_buffer_pointer()
    assert dataclasses.asdict(kept.statistics).keys() == dataclasses.asdict(params.statistics).keys()
