"""Wan's text-to-video checkpoints, in the form of diffusers' `WanTransformer3DModel`, into our DiT.

Names and shapes: diffusers 0.35-0.42, models/transformers/transformer_wan.py (Apache-2.0). What our DiT has beyond Wan (audio
attention, motion) keeps its initial values, with which it does nothing.
"""

import re
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from pikastream_jax.weights.safetensors_io import Params, flatten, restore_into, unflatten


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _matrix(x: np.ndarray) -> np.ndarray:
    return x.T  # [out, in] -> [in, out]


def _table(x: np.ndarray) -> np.ndarray:
    return x[0]  # without the axis for the batch


def _patch(x: np.ndarray) -> np.ndarray:
    """A convolution's [out, channel, 1, row, column] -> [row column channel, out], the order in which `patchify` cuts."""
    return x[:, :, 0].transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _linear(theirs: str, ours: str) -> list[tuple[str, str, Callable]]:
    return [(rf"{theirs}\.weight", f"{ours}.kernel", _matrix), (rf"{theirs}\.bias", f"{ours}.bias", _same)]


_BLOCK = r"blocks\.(\d+)"
_TABLE = [  # (regex of a name in the checkpoint, path in our parameters, what is done to the array)
    (r"patch_embedding\.weight", "patch_in.kernel", _patch),
    (r"patch_embedding\.bias", "patch_in.bias", _same),
    *_linear(r"condition_embedder\.time_embedder\.linear_1", "time_embed_in"),
    *_linear(r"condition_embedder\.time_embedder\.linear_2", "time_embed_out"),
    *_linear(r"condition_embedder\.time_proj", "time_projection"),
    *_linear(r"condition_embedder\.text_embedder\.linear_1", "text_embed.up"),
    *_linear(r"condition_embedder\.text_embedder\.linear_2", "text_embed.down"),
    (rf"{_BLOCK}\.scale_shift_table", r"blocks.\1.modulation", _table),
    *_linear(rf"{_BLOCK}\.attn1\.to_([qkv])", r"blocks.\1.self_attention.\2"),
    *_linear(rf"{_BLOCK}\.attn1\.to_out\.0", r"blocks.\1.self_attention.o"),
    (rf"{_BLOCK}\.attn1\.norm_([qk])\.weight", r"blocks.\1.self_attention.norm_\2.scale", _same),
    *_linear(rf"{_BLOCK}\.attn2\.to_([qkv])", r"blocks.\1.text_attention.\2"),
    *_linear(rf"{_BLOCK}\.attn2\.to_out\.0", r"blocks.\1.text_attention.o"),
    (rf"{_BLOCK}\.attn2\.norm_([qk])\.weight", r"blocks.\1.text_attention.norm_\2.scale", _same),
    (rf"{_BLOCK}\.norm2\.weight", r"blocks.\1.norm_text.scale", _same),
    (rf"{_BLOCK}\.norm2\.bias", r"blocks.\1.norm_text.bias", _same),
    *_linear(rf"{_BLOCK}\.ffn\.net\.0\.proj", r"blocks.\1.mlp.up"),
    *_linear(rf"{_BLOCK}\.ffn\.net\.2", r"blocks.\1.mlp.down"),
    (r"scale_shift_table", "head.modulation", _table),
    *_linear("proj_out", "head.projection"),
]
_OURS_ALONE = re.compile(r"motion_embed\..*|blocks\.\d+\.(norm_audio|audio_attention)\..*")


def load_wan(checkpoint: Mapping[str, np.ndarray], initial: Params) -> Params:
    """The DiT's parameters with a Wan checkpoint's values.

    Args:
      checkpoint: arrays by their name in diffusers.
      initial: freshly initialised parameters of our DiT of the same sizes.

    Raises:
      ValueError: naming every entry that no rule knows (an image-to-video checkpoint has such), or everything that is missing
        or of another shape.
    """
    converted, unknown = {}, []
    for name, array in checkpoint.items():
        for pattern, path, transform in _TABLE:
            if match := re.fullmatch(pattern, name):
                converted[match.expand(path)] = transform(np.asarray(array))
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"not of a Wan text-to-video model: {', '.join(sorted(unknown))}")
    ours_alone = {name: leaf for name, leaf in flatten(initial).items() if _OURS_ALONE.fullmatch(name)}
    return restore_into(initial, unflatten(converted | {name: jnp.asarray(leaf) for name, leaf in ours_alone.items()}))
