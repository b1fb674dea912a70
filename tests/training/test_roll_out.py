"""Training's roll-out is the stream: the same latents and the same cache, with gradient at the exit step and nowhere else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.diffusion.flow import solver_timesteps
from pikastream_jax.streaming.state import init_state, install_prompt, install_reference
from pikastream_jax.streaming.step import denoise_chunk
from pikastream_jax.training.roll_out import Script, roll_out, with_swaps
from pikastream_jax.training.training_form import Form, training_models
from tests.small import small_config, small_models

STREAM = dict(chunk=2, window=4, sink=2, steps=3)
CONFIG = small_config(**STREAM)
BATCH, FRAMES, JUDGED = 2, 10, 4  # sink, then two chunks that fill the ring, then one that drives the first of them out


def script(prompt=None, face=None):
    """Two prompts and two faces for each row; by default every chunk has the first of both."""
    rng = np.random.default_rng(0)
    audio, first = CONFIG.audio, [[0] * (FRAMES // 2)] * BATCH
    return Script(
        mel=jnp.asarray(rng.normal(size=(BATCH, FRAMES, audio.mel_frames, audio.mels)), jnp.float32),
        motion=jnp.asarray(rng.normal(size=(BATCH, FRAMES, CONFIG.dit.motion)), jnp.float32),
        tokens=jnp.asarray(rng.integers(1, 60, (BATCH, 2, CONFIG.text.length)), jnp.int32),
        valid=jnp.array([[3, 5], [6, 2]]),
        prompt=jnp.array(prompt or first),
        reference=jnp.asarray(rng.normal(size=(BATCH, 2, *CONFIG.latent_grid, 4)), jnp.float32),
        face=jnp.array(face or first),
    )


NOISE = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, FRAMES, *CONFIG.latent_grid, 4)), jnp.float32)


@functools.cache
def compiled(clean_pass=False):
    """(script, exit steps) -> state, latents, clean latents at the exit steps."""
    models, params = small_models(small_config(**STREAM, clean_pass=clean_pass))
    run = jax.jit(lambda params, script, exit_step: roll_out(models, params, script, NOISE, exit_step, JUDGED))
    return functools.partial(run, params.denoiser)


@functools.cache
def stepwise(clean_pass):
    """The stream by hand: encoders and `denoise_chunk`, each compiled on its own."""
    models, params = small_models(small_config(**STREAM, clean_pass=clean_pass))
    denoiser = models.denoiser
    reference = jax.jit(lambda params, latents: denoiser.bind(params).dit.reference_keys_values(latents))
    prompt = jax.jit(lambda params, tokens, valid: denoiser.bind(params).text_conditions(tokens, valid))
    heard = jax.jit(lambda params, state, mel, motion: denoiser.bind(params).conditions(state.text, state.text_valid, mel, motion))
    step = jax.jit(functools.partial(denoise_chunk, models))
    return tuple(functools.partial(function, params.denoiser) for function in (reference, prompt, heard, step))


@pytest.mark.parametrize("clean_pass", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_roll_out_is_the_stream_bit_for_bit(clean_pass):
    """Row 0 gets another prompt at chunk 2, row 1 another face at chunk 3, by the state's own functions."""
    told = script(prompt=[[0, 0, 1, 1, 1], [0] * 5], face=[[0] * 5, [0, 0, 0, 1, 1]])
    reference, prompt, heard, step = stepwise(clean_pass)
    state, latents = init_state(CONFIG, BATCH), []
    for chunk in range(FRAMES // 2):
        now = slice(2 * chunk, 2 * chunk + 2)
        words, face = [int(chunk >= 2), 0], [0, int(chunk >= 3)]
        rows = jnp.arange(BATCH)
        if chunk in (0, 2):
            state = install_prompt(state, *prompt(told.tokens[rows, jnp.array(words)][:, None], told.valid[rows, jnp.array(words)][:, None]))
        if chunk in (0, 3):
            kept = state.sink_count
            state = install_reference(state, reference(told.reference[rows, jnp.array(face)]))
            if chunk == 3:  # the install empties every row's sink; row 0 sees no new face
                assert kept.tolist() == [2, 2] and state.sink_count.tolist() == [0, 0]
                state = dataclasses.replace(state, sink_count=jnp.array([2, 0]))
        state, one = step(state, heard(state, told.mel[:, now], told.motion[:, now]), NOISE[:, now])
        latents.append(one)
    end, rolled, clean = compiled(clean_pass)(told, jnp.array([0, 1]))
    np.testing.assert_array_equal(rolled, np.concatenate(latents, axis=1))
    np.testing.assert_array_equal(end.dit_k, state.dit_k)
    np.testing.assert_array_equal(end.dit_v, state.dit_v)
    assert end.sink_count.tolist() == [2, 2] and end.ring_count.tolist() == [8, 6], "row 1 filled a sink twice; row 0's ring was driven out"
    assert clean.shape == (2, BATCH, 2, *CONFIG.latent_grid, 4) and np.std(rolled) > 0.1
    if clean_pass:
        kept = compiled()(told, jnp.array([0, 1]))[0].dit_k
        assert np.abs(end.dit_k - kept).max() > 0.01, "a clean re-pass is something else than the last step"


def test_the_cache_takes_the_last_step_whatever_the_exit_step():
    ends = [compiled()(script(), jnp.array(exits)) for exits in ([0, 0], [2, 1])]
    np.testing.assert_array_equal(ends[0][1], ends[1][1])
    np.testing.assert_array_equal(ends[0][0].dit_k, ends[1][0].dit_k)
    assert np.abs(ends[0][2] - ends[1][2]).max() > 0.01, "what carries the gradient is another step"
    # At the last step the exit's clean latents are those that the stream shows.
    last = compiled()(script(), jnp.array([2, 2]))
    np.testing.assert_allclose(last[2].swapaxes(0, 1).reshape(BATCH, JUDGED, *CONFIG.latent_grid, 4), last[1][:, -JUDGED:], atol=1e-5)


def test_gradient_comes_through_the_exit_step_alone():
    """The head's bias is added to every token's velocity, so the clean latents fall by t for it: the derivative is the sum of -t.

    A second path, through the cache or an earlier step, or from what the stream shows, would add to it.
    """
    models, params = small_models(CONFIG)
    told, exits = script(face=[[0, 0, 0, 0, 1], [0] * 5]), jnp.array([0, 2])

    @jax.jit
    def gradient_of(params):
        def total(params):
            end, latents, clean = roll_out(models, params, told, NOISE, exits, JUDGED)
            return jnp.sum(clean) + jnp.sum(latents**2) + jnp.sum(end.dit_k**2)

        return jax.grad(total)(params)

    gradient = gradient_of(params.denoiser)
    times = solver_timesteps(3, CONFIG.stream.shift)
    expected = -JUDGED * CONFIG.tokens_per_frame * (times[0] + times[2])
    np.testing.assert_allclose(gradient["dit"]["head"]["projection"]["bias"], expected, rtol=1e-5)
    for name in gradient["dit"]:
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient["dit"][name])) > 0, f"{name} takes no part"


def test_swaps_reach_their_row_from_their_chunk_on():
    plain = compiled()(script(), jnp.zeros(BATCH, jnp.int32))[1]
    swapped = compiled()(script(face=[[0] * 5, [0, 0, 1, 1, 1]]), jnp.zeros(BATCH, jnp.int32))[1]
    moved = np.abs(plain - swapped).max(axis=(2, 3, 4)).reshape(BATCH, -1, 2).max(axis=-1)
    assert (moved[0] == 0).all() and (moved[1, :2] == 0).all() and (moved[1, 2:] > 1e-3).all()


def test_half_of_the_rows_swap():
    rows, chunks = 3000, 5
    many = jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype), script())
    many = dataclasses.replace(many, tokens=jnp.broadcast_to(jnp.arange(rows)[:, None, None], (rows, 2, 6)))
    swapped = with_swaps(many, jnp.ones((rows, *CONFIG.latent_grid, 4)), jax.random.key(0), 3)
    prompt, face = np.asarray(swapped.prompt == 2), np.asarray(swapped.face == 2)
    for new in (prompt, face):
        assert new[:, -1].mean() == pytest.approx(0.25, abs=0.03)
        first = np.where(new.any(axis=1), new.argmax(axis=1), chunks)
        assert set(first) == {1, 2, 3, chunks} and (new.sum(axis=1) == chunks - first).all(), "and stays"
    assert not (prompt.any(axis=1) & face.any(axis=1)).any()
    np.testing.assert_array_equal(swapped.tokens[:, 2, 0], np.roll(np.arange(rows), 1))
    assert (swapped.reference[:, 2] == 1).all()


def test_lengths_that_cannot_be_are_refused():
    models, params = small_models(CONFIG)
    run = functools.partial(roll_out, models, params.denoiser, script())
    with pytest.raises(ValueError, match="5 latent frames, 0 of them judged, is not made of whole chunks of 2"):
        run(NOISE[:, :5])
    with pytest.raises(ValueError, match="10 latent frames, 12 of them judged"):
        run(NOISE, jnp.zeros(BATCH, jnp.int32), 12)
    with pytest.raises(ValueError, match="the script tells of 10 latent frames, the noise has 8"):
        run(NOISE[:, :8])
    rolling, weights = small_models(small_config(schedule="rolling"))
    with pytest.raises(ValueError, match="'rolling' has no exit step"):
        roll_out(rolling, weights.denoiser, script(), NOISE)
    other = NOISE[:, 0]
    with pytest.raises(ValueError, match="batch 1 is too small for swaps"):
        with_swaps(jax.tree.map(lambda leaf: leaf[:1], script()), other[:1], jax.random.key(0), 2)
    for last in (0, 5):
        with pytest.raises(ValueError, match=f"a swap at chunk 1 to {last} of 5"):
            with_swaps(script(), other, jax.random.key(0), last)


@pytest.mark.parametrize("form", [Form("bfloat16", "scan", "full"), Form("bfloat16")], ids=["scan", "unrolled"])
def test_a_roll_out_takes_every_form(form):
    """Traced only: caches have the form's precision, latents and gradients are float32."""
    models, params = small_models(CONFIG)
    models = training_models(models, form)

    def loss(params):
        state, latents, clean = roll_out(models, params, script(), NOISE, jnp.zeros(BATCH, jnp.int32), JUDGED)
        return jnp.mean(clean), (state.dit_k, latents)

    gradient, (cache, latents) = jax.eval_shape(jax.grad(loss, has_aux=True), params.denoiser)
    assert (cache.dtype, latents.dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
