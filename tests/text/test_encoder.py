"""The text encoder: padding and neighbours have no influence, words and their order do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.nn.layers import functional
from pikastream_jax.text.encoder import TextEncoder
from tests.small import randomised, small_config

CONFIG = small_config().text  # 6 tokens


@pytest.fixture(scope="module")
def encode():
    model = functional(lambda rngs: TextEncoder(CONFIG, rngs=rngs))
    params = randomised(model.abstract, 0)
    return jax.jit(lambda tokens, valid: model.bind(params)(tokens, valid))


TOKENS = jnp.array([[1, 5, 9, 0, 0, 0], [1, 7, 8, 9, 10, 11]], jnp.int32)
VALID = jnp.array([3, 6])


def test_padding_has_no_influence(encode):
    before = encode(TOKENS, VALID)
    assert before.shape == (2, CONFIG.length, CONFIG.dim) and np.std(before) > 0.1
    after = encode(TOKENS.at[0, 3:].set(42), VALID)
    np.testing.assert_allclose(after[0, :3], before[0, :3], atol=1e-6)
    np.testing.assert_array_equal(after[1], before[1])


def test_a_word_reaches_every_token_of_its_own_prompt_alone(encode):
    before = encode(TOKENS, VALID)
    difference = np.abs(encode(TOKENS.at[1, 4].set(42), VALID) - before).max(axis=2)
    assert (difference[1] > 1e-3).all() and (difference[0] == 0).all()


def test_the_length_decides_what_counts(encode):
    shorter = encode(TOKENS, jnp.array([3, 5]))
    assert np.abs(shorter[1, :5] - encode(TOKENS, VALID)[1, :5]).max() > 1e-3


def test_the_order_of_words_matters(encode):
    swapped = TOKENS.at[1, 1:3].set(TOKENS[1, 1:3][::-1])
    before, after = encode(TOKENS, VALID)[1], encode(swapped, VALID)[1]
    exchanged = jnp.concatenate([before[:1], before[1:3][::-1], before[3:]])
    assert np.abs(after - exchanged).max() > 1e-3


def test_the_empty_prompt_is_finite(encode):
    assert np.isfinite(encode(TOKENS, jnp.array([1, 1]))).all()
