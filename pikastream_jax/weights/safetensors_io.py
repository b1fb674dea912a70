"""Parameters to and from safetensors files.

A parameter tree is the nested dict that `nnx.to_pure_dict(nnx.state(model, nnx.Param))` gives: string or integer keys,
arrays at the leaves. In the file a leaf is named by its path joined with dots (`blocks.0.attention.kernel`), the
convention every tool that reads safetensors knows. Format: https://huggingface.co/docs/safetensors.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which reading a file needs)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Params = dict[str | int, Any]
_NAMED = 6  # problems that an error names


def save(
    path: str | os.PathLike[str],
    params: Mapping[str | int, Any],
    metadata: Mapping[str, str] | None = None,
    dtype: Any = jnp.bfloat16,
) -> None:
    """Writes a parameter tree to one safetensors file, whole or not at all.

    Args:
      path: the file to write; its folder is made if missing.
      params: nested dict of arrays of any shape.
      metadata: strings kept in the file's header (the command, the seed, the configuration as JSON).
      dtype: floating-point leaves are cast to this; integer and boolean leaves keep their own.

    Raises:
      ValueError: a key holds a dot, is neither string nor integer, or names the same file entry as another key; or a
        metadata value is not a string.
    """
    path = Path(path)
    wrong = [f"{key}={value!r}" for key, value in (metadata or {}).items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"safetensors metadata values must be strings, got {', '.join(wrong)}: pass json.dumps(value)")
    flat = {}
    for name, leaf in flatten(params).items():
        array = np.asarray(leaf)
        if jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(dtype)
        flat[name] = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes scalars 1-D
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(flat, partial, metadata=dict(metadata or {}))
    partial.replace(path)


def load(path: str | os.PathLike[str]) -> tuple[Params, dict[str, str]]:
    """Reads a file that `save` wrote.

    Returns:
      The nested dict of numpy arrays in their stored dtypes (path parts made of digits become integer keys, as in
      `nnx.to_pure_dict`), and the header's metadata.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a readable safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        with safe_open(path, framework="np") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): copy or write it anew") from error
    return unflatten(flat), metadata


def restore_into(abstract: Mapping[str | int, Any], loaded: Mapping[str | int, Any]) -> Params:
    """Gives `loaded` the structure and dtypes of `abstract`, after checking that they fit.

    Args:
      abstract: nested dict of arrays or `jax.ShapeDtypeStruct`s: what the model expects.
      loaded: nested dict of arrays, as `load` returns it.

    Returns:
      A nested dict with the keys of `abstract` and `jax.Array` leaves in its dtypes.

    Raises:
      ValueError: naming the first of the missing entries, unexpected entries and wrong shapes, and how many there are.
    """
    wanted, found = flatten(abstract), flatten(loaded)
    problems = [f"missing {name} {tuple(wanted[name].shape)}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"unexpected {name} {tuple(found[name].shape)}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, the model expects {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if tuple(wanted[name].shape) != tuple(found[name].shape)
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit the model ({len(problems)} problems): "
            + "; ".join(problems[:_NAMED])
            + (f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else "")
            + ". Use the configuration that the weights were trained with."
        )

    def build(node: Mapping[str | int, Any], path: str) -> Params:
        return {
            key: build(child, f"{path}{key}.")
            if isinstance(child, Mapping)
            else jnp.asarray(found[f"{path}{key}"], child.dtype)
            for key, child in node.items()
        }

    return build(abstract, "")


def flatten(params: Mapping[str | int, Any]) -> dict[str, Any]:
    """Nested dict -> {path joined by dots: leaf}.

    Raises:
      ValueError: for a key that holds a dot, is empty, is neither string nor integer, or collides with another.
    """
    flat: dict[str, Any] = {}

    def visit(node: Any, path: str) -> None:
        if not isinstance(node, Mapping):
            if path in flat:
                raise ValueError(f"two parameters are both named {path!r}: rename one")
            flat[path] = node
            return
        for key, child in node.items():
            if isinstance(key, bool) or not isinstance(key, str | int) or key == "" or "." in str(key):
                raise ValueError(f"key {key!r} under {path!r} must be an integer, or a non-empty string without dots")
            visit(child, f"{path}.{key}" if path else str(key))

    if not isinstance(params, Mapping):
        raise ValueError(f"parameters must be a nested dict, got {type(params).__name__}")
    visit(params, "")
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """{path joined by dots: leaf} -> nested dict; parts made of digits become integer keys."""
    tree: Params = {}
    for name, leaf in flat.items():
        *parents, last = [int(part) if part.isdecimal() else part for part in name.split(".")]
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree
