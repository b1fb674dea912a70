import json
import struct
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pikastream_jax.weights import safetensors_io

names = st.one_of(st.integers(0, 30), st.text("abcdefgh_", min_size=1, max_size=6))
arrays = st.builds(
    lambda shape, seed, dtype: np.random.default_rng(seed).normal(size=shape, scale=3).astype(dtype),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(0, 1000),
    st.sampled_from([np.float32, ml_dtypes.bfloat16, np.int32, np.bool_]),
)
trees = st.dictionaries(
    names,
    st.recursive(arrays, lambda child: st.dictionaries(names, child, min_size=1, max_size=3), max_leaves=6),
    min_size=1,
)
words = st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=20), max_size=3)


def keys_as_text(tree):
    """jax.tree cannot sort a dict with both kinds of key."""
    return {str(key): keys_as_text(leaf) if isinstance(leaf, dict) else leaf for key, leaf in tree.items()}


@settings(deadline=None, max_examples=40)
@given(trees, words, st.sampled_from([jnp.bfloat16, jnp.float32]))
def test_round_trip(tree, metadata, dtype):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "w.safetensors"
        safetensors_io.save(path, tree, metadata, dtype)
        loaded, read = safetensors_io.load(path)
        assert [file.name for file in path.parent.iterdir()] == ["w.safetensors"]
    assert read == metadata
    want, got = safetensors_io.flatten(tree), safetensors_io.flatten(loaded)
    assert want.keys() == got.keys()
    for name, leaf in want.items():
        expected = leaf.astype(dtype) if leaf.dtype in (np.float32, ml_dtypes.bfloat16) else leaf
        assert got[name].dtype == expected.dtype and got[name].shape == leaf.shape
        assert got[name].tobytes() == expected.tobytes()
    restored = safetensors_io.restore_into(tree, loaded)
    assert jax.tree.structure(keys_as_text(restored)) == jax.tree.structure(keys_as_text(tree))
    assert safetensors_io.flatten(restored).keys() == want.keys()


def test_the_file_is_plain_safetensors(tmp_path):
    """Read by the format's definition: 8 bytes of header length, a JSON header, raw little-endian data."""
    kernel = jax.random.normal(jax.random.key(0), (3, 5))
    safetensors_io.save(tmp_path / "w.safetensors", {"blocks": {0: {"kernel": kernel}}}, {"seed": "7"})
    raw = (tmp_path / "w.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    entry = header["blocks.0.kernel"]
    assert header["__metadata__"] == {"seed": "7"}
    assert entry["dtype"] == "BF16" and entry["shape"] == [3, 5]
    begin, end = entry["data_offsets"]
    high_halves = np.frombuffer(raw[8 + length + begin : 8 + length + end], "<u2").astype(np.uint32) << 16
    np.testing.assert_allclose(high_halves.view(np.float32).reshape(3, 5), kernel, rtol=2**-8)


def test_a_jax_view_is_saved_as_it_looks(tmp_path):
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3).T  # not contiguous
    safetensors_io.save(tmp_path / "w.safetensors", {"kernel": kernel})
    np.testing.assert_array_equal(
        safetensors_io.load(tmp_path / "w.safetensors")[0]["kernel"].astype(np.float32), kernel
    )


def test_every_misfit_is_named_at_once():
    model = {"a": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}, "b": jax.ShapeDtypeStruct((4,), jnp.float32)}
    loaded = {"a": {"kernel": np.ones((3, 2), np.float32)}, "c": np.ones(1, np.float32)}
    with pytest.raises(ValueError) as error:
        safetensors_io.restore_into(model, loaded)
    for part in (
        "3 problems",
        "missing b (4,)",
        "unexpected c (1,)",
        "a.kernel has shape (3, 2), the model expects (2, 3)",
    ):
        assert part in str(error.value)


def test_restoring_takes_the_dtype_and_keys_of_the_model():
    model = {"blocks": {"0": jax.ShapeDtypeStruct((2,), jnp.float32)}}
    restored = safetensors_io.restore_into(model, {"blocks": {0: np.ones(2, ml_dtypes.bfloat16)}})
    assert restored["blocks"]["0"].dtype == jnp.float32


@pytest.mark.parametrize("params", [{"a.b": 1}, {"": 1}, {1.5: 1}, {True: 1}, {"x": {0: 1, "0": 2}}])
def test_names_that_would_not_come_back_are_refused(tmp_path, params):
    with pytest.raises(ValueError, match="must be an integer|both named"):
        safetensors_io.save(tmp_path / "w.safetensors", params)
    assert not list(tmp_path.iterdir())


def test_metadata_must_be_text(tmp_path):
    with pytest.raises(ValueError, match="seed=7"):
        safetensors_io.save(tmp_path / "w.safetensors", {"a": np.ones(1)}, {"seed": 7})


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file"):
        safetensors_io.load(tmp_path / "none.safetensors")
    safetensors_io.save(tmp_path / "w.safetensors", {"a": np.ones(100)})
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        safetensors_io.load(tmp_path / "w.safetensors")
