"""How the programs of a stream are compiled."""

import jax

# By default XLA calls YNN for every product (without it, Eigen), and cuts a sum over more than 32 numbers in two passes, as in every softmax here. Measured in
# alternation with `tiny`, two steps and chunks of two latent frames, on two cores with AVX2 and jax 0.10.2: without the first a step takes 0.91 of its time,
# without both 0.80 to 0.85.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_disable_hlo_passes": "tree_reduction_rewriter"}


def stream_options() -> dict[str, str] | None:
    """`compiler_options` of `jax.jit` for programs in the path of a frame; None where XLA's defaults are the best known."""
    return _CPU if jax.default_backend() == "cpu" else None
