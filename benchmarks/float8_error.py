"""What e4m3 products change in the 9B preset: `python -m benchmarks.float8_error`, on any machine with 8 GB, in some minutes.

A denoising pass of one latent frame (390 tokens) through all 30 blocks at full width, with random weights drawn block by block, so that no more
than one block is in memory: once with bfloat16 products and once with e4m3, against the same pass in float32. Queries see the frame's own keys,
128 text tokens and 32 audio tokens. Trained weights have outliers that random ones lack: what e4m3 does to those is measured on the small
model, in docs/performance.md.
"""

import functools
import json

import jax
import jax.numpy as jnp

from benchmarks.correctness import relative_error
from configs import preset
from pallas_kernels import frame_attention
from pikastream_jax.dit.block import DiTBlock
from pikastream_jax.nn.layers import functional
from pikastream_jax.nn.rope import grid_positions, rope_tables, rotate
from pikastream_jax.streaming.serving_form import served_block

CONFIG = preset("pikastream_9b")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float8": jnp.bfloat16}


def random_params(abstract, key):
    """Kernels that keep the variance of their input; scales near 1, everything else small."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    drawn = []
    for index, (path, leaf) in enumerate(leaves):
        noise = jax.random.normal(jax.random.fold_in(key, index), leaf.shape)
        name = path[-1].key
        drawn.append(1 + 0.1 * noise if name == "scale" else noise * (leaf.shape[0] ** -0.5 if name == "kernel" else 0.1))
    return jax.tree.unflatten(tree, drawn)


@functools.partial(jax.jit, static_argnames="precision")
def run_block(params, x, time, text, audio, precision):
    """One block in the given precision, tokens [1, 1, n, d]."""
    block = BLOCK.bind(jax.tree.map(lambda leaf: leaf.astype(DTYPES[precision]), params))
    served_block(precision, block)
    tables = rope_tables(*grid_positions(jnp.zeros(1), *CONFIG.token_grid), CONFIG.dit.head_dim)

    def attend_self(q, k, v):
        return frame_attention(rotate(q, tables), rotate(k, tables), v)

    def attend(attention, context):
        keys, values = attention.keys_values(context.astype(DTYPES[precision]))
        return lambda q: frame_attention(q, keys, values)

    return block(x, time, attend_self, attend(block.text_attention, text), attend(block.audio_attention, audio))


BLOCK = functional(lambda rngs: DiTBlock(CONFIG.dit, rngs=rngs))


def main() -> None:
    dit, key = CONFIG.dit, jax.random.key(0)
    shapes = {"x": (1, 1, CONFIG.tokens_per_frame, dit.dim), "time": (1, 1, 6, dit.dim)}
    shapes |= {"text": (1, 1, CONFIG.text.length, dit.dim), "audio": (1, 1, CONFIG.audio.tokens, dit.audio_dim)}
    given = {name: jax.random.normal(jax.random.fold_in(key, i), shape) for i, (name, shape) in enumerate(shapes.items())}
    start = given.pop("x")
    given["time"] = 0.3 * given["time"]
    tokens = {precision: start.astype(dtype) for precision, dtype in DTYPES.items()}
    alone = []  # of a block given the same input
    for index in range(dit.blocks):
        params = jax.jit(functools.partial(random_params, BLOCK.abstract))(jax.random.fold_in(key, 100 + index))
        before = tokens["float32"]
        tokens = {precision: run_block(params, x, **given, precision=precision) for precision, x in tokens.items()}
        once = run_block(params, before.astype(jnp.bfloat16), **given, precision="float8")
        update = tokens["float32"] - before
        alone.append(relative_error(once.astype(jnp.float32) - before, update))
        so_far = {name: round(relative_error(tokens[name], tokens["float32"]), 4) for name in ("bfloat16", "float8")}
        print(f"block {index + 1:2}: tokens so far {so_far}, what the block adds, in float8 alone {alone[-1]:.4f}", flush=True)
    result = {"tokens_after_all_blocks": so_far, "fp8_against_bf16": round(relative_error(tokens["float8"], tokens["bfloat16"]), 4)}
    print(json.dumps(result | {"one_block_alone_mean": round(sum(alone) / len(alone), 4)}))


if __name__ == "__main__":
    main()
