"""Measurements of speed and memory, run by hand; nothing in the package imports them."""
