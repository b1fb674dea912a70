"""Grids that hold the student's steps, guidance, and Euler against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.config import StreamConfig
from pikastream_jax.diffusion.flow import solver_timesteps
from pikastream_jax.training.dit_data import DiTBatch
from pikastream_jax.training.sampling import (
    Guidance,
    bidirectional_velocity,
    euler,
    guided,
    refined_timesteps,
    sample_teacher,
)
from tests.small import small_config, small_models

CONFIG = small_config()


def some_batch(b=2, f=3, seed=0) -> DiTBatch:
    rng = np.random.default_rng(seed)
    audio = CONFIG.audio
    return DiTBatch(
        latents=jnp.asarray(rng.normal(size=(b, f, 6, 4, 4)), jnp.float32),
        reference=jnp.asarray(rng.normal(size=(b, 6, 4, 4)), jnp.float32),
        other_reference=jnp.zeros((b, 6, 4, 4)),
        mel=jnp.asarray(rng.normal(size=(b, f, audio.mel_frames, audio.mels)), jnp.float32),
        tokens=jnp.asarray(rng.integers(2, 60, (b, 1, CONFIG.text.length))),
        valid=jnp.full((b, 1), 4),
        frame_prompt=jnp.zeros((b, f), jnp.int32),
        keep_audio=jnp.ones(b, bool),
        weight=jnp.ones((b, f, 6, 4)),
        boxes=jnp.zeros((b, f, 2, 4)),
        truth=jnp.zeros((b, f, 8)),
        opening=jnp.zeros((b, f, 4)),
        motion=jnp.asarray(rng.normal(size=(b, f, CONFIG.dit.motion)), jnp.float32),
    )


@pytest.mark.parametrize(("student", "shift", "steps", "parts"), [(4, 2.0, 48, 12), (4, 2.0, 50, 13), (3, 5.0, 48, 16), (7, 2.0, 10, 2)])
def test_the_fine_grid_holds_the_students_timesteps(student, shift, steps, parts):
    stream = StreamConfig(steps=student, shift=shift)
    times, anchors = refined_timesteps(stream, steps)
    np.testing.assert_array_equal(times[anchors], solver_timesteps(student, shift))
    assert len(times) == parts * student + 1 and times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()
    # Between two of the student's timesteps the parts are equal in unshifted time: s t / (1 + (s - 1) t) undone.
    plain = times / (shift - (shift - 1) * times)
    np.testing.assert_allclose(np.diff(plain), -1 / (parts * student), atol=1e-6)


def test_euler_on_a_linear_field_by_its_closed_form():
    """dx/dt = a x: every step multiplies by 1 + a dt; with many steps that is exp(a (t - 1))."""
    start = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
    times = np.array([1.0, 0.7, 0.4, 0.15, 0.0], np.float32)
    end, kept = euler(lambda x, t: 2.0 * x, start, times, kept=(0, 2, 4))
    factor = np.cumprod(np.r_[1.0, 1 + 2.0 * np.diff(times.astype(np.float64))])
    np.testing.assert_allclose(end, factor[-1] * start, rtol=1e-5)
    np.testing.assert_allclose(kept, factor[[0, 2, 4]][:, None, None] * np.asarray(start), rtol=1e-5)
    fine, _ = euler(lambda x, t: 2.0 * x, start, np.linspace(1, 0, 2001))
    np.testing.assert_allclose(fine, np.exp(-2.0) * start, rtol=2e-3)


def test_the_flow_of_a_gaussian_ends_at_its_quantile():
    """Data N(m, s^2): the exact velocity carries noise z to m + s z, whichever the grid, as steps grow."""
    m, s = 0.7, 0.3

    def velocity(x, t):  # E[noise - clean | x_t = x], a regression of two joint Gaussians
        variance = (1 - t) ** 2 * s**2 + t**2
        return (t - (1 - t) * s**2) / variance * (x - (1 - t) * m) - m

    z = jnp.linspace(-2.0, 2.0, 9)[None]
    times, anchors = refined_timesteps(StreamConfig(steps=4, shift=2.0), 800)
    end, kept = euler(velocity, z, times, tuple(anchors))
    np.testing.assert_allclose(end, m + s * z, atol=4e-3)
    for x, t in zip(kept, times[anchors], strict=True):  # x_t of that Gaussian, by its own quantiles
        np.testing.assert_allclose(x, (1 - t) * m + np.sqrt((1 - t) ** 2 * s**2 + t**2) * z, atol=4e-3)


def test_indices_that_do_not_rise_are_refused():
    for kept in ((2, 1), (1, 1), (0, 3), (-1,)):
        with pytest.raises(ValueError, match="must be rising indices into the 3 timesteps"):
            euler(lambda x, t: x, jnp.zeros((1, 2)), np.array([1.0, 0.5, 0.0]), kept)
    with pytest.raises(ValueError, match="steps 0 must be at least 1"):
        refined_timesteps(StreamConfig(), 0)


def test_guidance_by_hand():
    """A network that answers 1, 10 more with words, 100 with a face and 1000 with sound."""
    batch = some_batch()
    batch = dataclasses.replace(batch, valid=batch.valid.at[0].set(1))
    calls = []

    def velocity(told):
        calls.append(told)
        words, face = (told.valid > 1).all(axis=1), jnp.any(told.reference != 0, axis=(1, 2, 3))
        answer = 1.0 + 10 * words + 100 * face + 1000 * told.keep_audio
        return jnp.broadcast_to(answer[:, None, None, None, None], batch.latents.shape)

    for scales, expected, passes in ((Guidance(), [1101, 1111], 1), (Guidance(3.0, 1.1, 1.5), [1251, 1281], 4), (Guidance(reference=0.0), [1001, 1011], 2)):
        calls.clear()
        answer = guided(velocity, batch, scales)
        np.testing.assert_allclose(answer[:, 0, 0, 0, 0], expected, rtol=1e-6)
        assert len(calls) == passes, "a scale of 1 asks nothing"
    with pytest.raises(ValueError, match="scale -1.0 of audio must be finite and at least 0"):
        Guidance(audio=-1.0)


def test_a_teachers_sample_is_euler_on_its_velocity():
    """Step by step by hand; and a state that was kept can be gone on from."""
    models, params = small_models(CONFIG)
    batch, distance = some_batch(), jnp.array([8.0, 5.0])
    start = jax.random.normal(jax.random.key(0), batch.latents.shape)
    times = np.array([1.0, 0.8, 0.3, 0.0], np.float32)
    scales = Guidance(text=2.0)

    @jax.jit
    def velocity(params, batch, x, t):
        return bidirectional_velocity(models.denoiser, params, batch, x, jnp.full(x.shape[:2], t), distance)

    @jax.jit
    def run(params, batch, start):
        end, kept = sample_teacher(models.denoiser, params, batch, start, times, distance, scales, kept=(1,))
        return end, kept, sample_teacher(models.denoiser, params, batch, kept[0], times[1:], distance, scales)[0]

    wordless = dataclasses.replace(batch, valid=jnp.ones_like(batch.valid))
    x = start
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        told, untold = (velocity(params.denoiser, given, x, t) for given in (batch, wordless))
        x = x + (t_next - t) * (2.0 * told - untold)
    end, kept, resumed = run(params.denoiser, batch, start)
    assert kept.shape == (1, *start.shape) and np.std(end - start) > 0.1
    np.testing.assert_allclose(end, x, atol=1e-4)
    np.testing.assert_allclose(resumed, end, atol=1e-5)
