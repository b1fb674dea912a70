"""Attention kernels: one front door each, beside the plain JAX that defines it."""

from pallas_kernels.chunked_attention import chunked_attention
from pallas_kernels.frame_attention import frame_attention
from pallas_kernels.ring_attention import ring_attention

__all__ = ["chunked_attention", "frame_attention", "ring_attention"]
