"""How the programs of a stream are compiled."""

import jax

# Measured with `tiny`, two steps and chunks of two latent frames, on two cores (AVX2): a step takes 0.80 of its time. XLA's default calls YNN for every
# product, which reaches half of Eigen's speed where a factor has few rows, as in a chunk; and it cuts a sum over more than 32 numbers in two passes, which
# serves accuracy (a softmax over hundreds does not need it) and costs a pass over all logits.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_disable_hlo_passes": "tree_reduction_rewriter"}


def stream_options() -> dict[str, str] | None:
    """`compiler_options` of `jax.jit` for programs in the path of a frame; None where XLA's defaults are the best known."""
    return _CPU if jax.default_backend() == "cpu" else None
