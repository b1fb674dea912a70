"""Patches by hand, and there and back."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pikastream_jax.nn.patch import patchify, unpatchify

PICTURE = np.array(
    [
        [0, 1, 2, 3, 4, 5],
        [10, 11, 12, 13, 14, 15],
        [20, 21, 22, 23, 24, 25],
        [30, 31, 32, 33, 34, 35],
    ]
)
TOKENS = [[0, 1, 10, 11], [2, 3, 12, 13], [4, 5, 14, 15], [20, 21, 30, 31], [22, 23, 32, 33], [24, 25, 34, 35]]


def test_tokens_by_hand():
    assert patchify(PICTURE[..., None], 2).tolist() == TOKENS
    assert unpatchify(np.array(TOKENS), 2, 2, 3)[..., 0].tolist() == PICTURE.tolist()


def test_channels_run_fastest_in_a_token():
    coloured = PICTURE[..., None] * 10 + np.array([1, 2, 3])
    assert patchify(coloured, 2)[1].tolist() == [21, 22, 23, 31, 32, 33, 121, 122, 123, 131, 132, 133]


@settings(max_examples=30, deadline=None)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.integers(1, 4),
    channels=st.integers(1, 3),
)
def test_there_and_back(batch, rows, columns, patch, channels):
    shape = (*batch, rows * patch, columns * patch, channels)
    picture = np.arange(np.prod(shape)).reshape(shape)
    tokens = patchify(picture, patch)
    assert tokens.shape == (*batch, rows * columns, patch * patch * channels)
    np.testing.assert_array_equal(unpatchify(tokens, patch, rows, columns), picture)
    # Token (r, c) is the block of pixels at its place.
    r, c = rows - 1, columns // 2
    block = picture[..., r * patch : (r + 1) * patch, c * patch : (c + 1) * patch, :]
    np.testing.assert_array_equal(tokens[..., r * columns + c, :], block.reshape(*batch, -1))
