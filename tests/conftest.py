"""Settings of every test, made before JAX is imported."""

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

# Compiled programs are kept between runs: the second run of the suite spends its time testing.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
