"""How the DiT's blocks follow one another: written out, as it is served; traced once, as small models are trained; or scanned over stacked weights,
as large ones are.

Blocks traced once compile to the same program as blocks written out, and are traced and lowered in half the time (an update of self-forcing, `tiny`,
on one core: 12 seconds instead of 23). But each layer's part is cut out of caches before the block reads it, which is why serving writes the blocks out.
A scan also compiles one block instead of all. On a GPU it copies each block's weights out of the stack in every iteration.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from pikastream_jax.dit.block import DiTBlock

# What a block's backward pass finds kept: everything, the results of products with weights, or its input alone.
REMATERIALISE = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# (block, x, layers, layer) -> (x, what the layer gives back); the layer's own part of every leaf of `layers` is `leaf[layer]`.
Body = Callable[[DiTBlock, Any, PyTree, int], tuple[Any, PyTree]]


class ScannedBlocks(nnx.Module):
    """Blocks as one block whose every parameter has a leading axis of layers."""

    def __init__(self, blocks: Sequence[DiTBlock]):
        states = [nnx.state(block) for block in blocks]
        self.block = nnx.merge(nnx.graphdef(blocks[0]), jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


class BlocksTracedOnce(nnx.Module):
    """Blocks that differ in their parameters' values alone."""

    def __init__(self, blocks: Sequence[DiTBlock]):
        self.blocks = nnx.List(blocks)


def run_blocks(blocks: Sequence[DiTBlock] | BlocksTracedOnce | ScannedBlocks, body: Body, x: Any, layers: PyTree, rematerialise: str) -> tuple[Any, PyTree]:
    """`x` through `body` for one block after another.

    Args:
      layers: arrays [layers, ...]: what each layer has of its own beside its parameters.
      rematerialise: a name of `REMATERIALISE`; of no effect on blocks that are written out.

    Returns:
      The last x, and what the layers gave back, stacked.
    """

    def kept(function: Callable, scanned: bool) -> Callable:
        if rematerialise == "none":
            return function
        return jax.checkpoint(function, policy=REMATERIALISE[rematerialise], prevent_cse=not scanned)

    def any_layer(graph: nnx.GraphDef) -> Callable:
        def step(x, own):
            parameters, layer = own
            return body(nnx.merge(graph, parameters), x, jax.tree.map(lambda leaf: leaf[None], layer), 0)

        return step

    if isinstance(blocks, ScannedBlocks):
        graph, state = nnx.split(blocks.block)
        return jax.lax.scan(kept(any_layer(graph), True), x, (state, layers))
    results = []
    if isinstance(blocks, BlocksTracedOnce):
        step = jax.jit(kept(any_layer(nnx.graphdef(blocks.blocks[0])), False))
        for layer, block in enumerate(blocks.blocks):
            x, result = step(x, (nnx.state(block), jax.tree.map(lambda leaf, layer=layer: leaf[layer], layers)))
            results.append(result)
    else:
        for layer, block in enumerate(blocks):
            x, result = body(block, x, layers, layer)
            results.append(result)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
