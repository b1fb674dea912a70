"""CUDA graphs and the choice of the attention kernel: how a prepared piece of work is run."""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Hopper's cuDNN attention is faster than the FlashAttention 2 inside PyTorch; the math path is what a CPU may need.
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def preferred_attention():
    """The context in which everything runs, is compiled and is captured: cuDNN first, then FlashAttention."""
    return sdpa_kernel(_BACKENDS, set_priority=True)


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """`run`, which reads and writes buffers at fixed addresses alone, as a CUDA graph; returns its replay. Never executed yet."""
    side = torch.cuda.Stream()
    with torch.no_grad(), preferred_attention():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, tunes, and gives libraries their workspaces, none of which a graph may hold
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return graph.replay
