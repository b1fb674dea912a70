"""The discriminator: what an answer looks at, its shapes, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.flash_vae.discriminator import Discriminator
from pikastream_jax.nn.layers import functional
from tests.small import randomised


def test_an_answer_sees_38_pixels_of_7_frames():
    model = functional(lambda rngs: Discriminator(2, rngs=rngs))
    params = randomised(model.abstract, 0)
    video = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 12, 64, 48, 3)), jnp.float32)

    @jax.jit
    def run(video):
        answers, pull = jax.vjp(model.bind(params), video)
        return answers, pull(jnp.zeros_like(answers).at[0, 1, 4, 3].set(1.0))[0]

    answers, gradient = run(video)
    assert answers.shape == (1, 3, 8, 6)
    t, y, x = (np.unique(axis) for axis in np.nonzero(np.abs(np.asarray(gradient[0])).sum(axis=-1)))
    # Padding puts pixel 8 i + 3.5 into the middle of answer i, and frame 4 i into that of its frames.
    assert (y[0], y[-1], x[0], x[-1]) == (35 - 18, 36 + 18, 27 - 18, 28 + 18 if 28 + 18 < 48 else 47)
    assert len(y) == 38 and (t[0], t[-1]) == (1, 7)


def test_what_does_not_divide_is_refused():
    model = functional(lambda rngs: Discriminator(1, rngs=rngs))
    params = randomised(model.abstract, 0)
    for shape in ((1, 6, 16, 16, 3), (1, 4, 12, 16, 3)):
        with pytest.raises(ValueError, match="must be multiples of 4 frames and 8 pixels"):
            jax.eval_shape(lambda video: model.bind(params)(video), jax.ShapeDtypeStruct(shape, jnp.float32))
    with pytest.raises(ValueError, match="dim 0 must be at least 1"):
        functional(lambda rngs: Discriminator(0, rngs=rngs))
