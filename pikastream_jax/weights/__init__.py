"""Weights on disk: safetensors in and out."""
