"""PikaStream in JAX: speech and one picture in, a talking face out, live."""

__version__ = "0.1.0"
