"""The range tables of the training attention against `frame_visibility`, pair by pair."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.chunked_attention import frame_visibility
from pallas_kernels.chunked_attention_ranges import (
    ALIGNMENT,
    full_range,
    joined,
    seeing_frames,
    token_ranges,
    visible_frames,
)

FRAMES = (1, 5, 8)  # few shapes: each compiles once
visibility = jax.jit(frame_visibility, static_argnames="copies")
visible = jax.jit(visible_frames, static_argnames="copies")
seeing = jax.jit(seeing_frames, static_argnames="copies")


@functools.partial(jax.jit, static_argnames=("copies", "tokens", "others", "tile"))
def query_ranges(chunk_ids, *, window, copies, tokens, others, tile):
    chunked = token_ranges(visible_frames(chunk_ids, window=window, copies=copies), tokens=tokens, tile=tile)
    n = tokens * copies * chunk_ids.shape[1]
    return joined(chunked, full_range(batch=2, tokens=n, others=others, tile=tile))


@st.composite
def sequences(draw):
    """Chunk ids [2, f], non-decreasing and with gaps, a window and a number of copies."""
    frames = draw(st.sampled_from(FRAMES))
    steps = draw(st.lists(st.lists(st.sampled_from([0, 0, 1, 3]), min_size=frames, max_size=frames), min_size=2, max_size=2))
    return np.cumsum(steps, axis=1), draw(st.sampled_from([0, 1, 3, 20])), draw(st.sampled_from([1, 2]))


def counts(ranges, columns):
    """How many of a row's ranges hold each column: [..., rows, columns] of ranges [..., rows, 2 r]."""
    first, last = ranges[..., 0::2, None], ranges[..., 1::2, None]
    index = np.arange(columns)
    return ((first <= index) & (index < last)).sum(axis=-2)


@settings(max_examples=150, deadline=None)
@given(sequences())
def test_every_pair_of_frames_is_in_exactly_the_ranges_the_definition_says(sequence):
    chunk_ids, window, copies = sequence
    expected = np.asarray(visibility(jnp.asarray(chunk_ids), window=window, copies=copies)).astype(int)
    rows = np.asarray(visible(jnp.asarray(chunk_ids), window=window, copies=copies))
    np.testing.assert_array_equal(counts(rows, expected.shape[2]), expected)
    columns = np.asarray(seeing(jnp.asarray(chunk_ids), window=window, copies=copies))
    np.testing.assert_array_equal(counts(columns, expected.shape[1]), np.swapaxes(expected, 1, 2))


@settings(max_examples=40, deadline=None)
@given(sequences(), st.sampled_from([1, 3]))
def test_tiles_hold_the_union_and_the_common_part_of_their_tokens(sequence, tokens):
    chunk_ids, window, copies = sequence
    tile, m = 8, 5
    n = chunk_ids.shape[1] * copies * tokens
    ranges = query_ranges(jnp.asarray(chunk_ids), window=window, copies=copies, tokens=tokens, others=m, tile=tile)
    rows = np.moveaxis(np.asarray(ranges.rows), 1, 2)  # [b, p, 6]
    assert rows.shape[1] % tile == 0 and rows.shape[1] - n < tile
    assert not rows[:, n:].any()  # the padding meets nothing
    seen = np.asarray(visibility(jnp.asarray(chunk_ids), window=window, copies=copies)).repeat(tokens, 1).repeat(tokens, 2)
    np.testing.assert_array_equal(counts(rows[:, :n, :4], n), seen.astype(int))
    np.testing.assert_array_equal(rows[:, :n, 4:], np.broadcast_to([0, m], (2, n, 2)))
    tiles = np.asarray(ranges.tiles)
    for row, t, part in np.ndindex(2, rows.shape[1] // tile, 3):
        meets = counts(rows[row, t * tile : (t + 1) * tile, 2 * part : 2 * part + 2], n + m)  # [tile, n + m]
        least, most, inside, outside = tiles[row, t, 4 * part : 4 * part + 4]
        met = np.flatnonzero(meets.any(axis=0))
        assert (least, most) == ((met[0] - met[0] % ALIGNMENT, met[-1] + 1) if met.size else (0, 0))
        assert meets[:, inside:outside].all()
        assert inside >= outside or not meets[:, :inside].all(axis=0).any() and not meets[:, outside:].all(axis=0).any()
