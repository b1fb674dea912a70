"""Settings of every test, made before JAX is imported."""

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent

# Compiled programs are kept between runs: the second run of the suite spends its time testing.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# Tests of small models spend their time compiling; little of it goes into optimising programs that run for milliseconds.
# Packages that draw faces keep the optimiser: they spend their time running.
_SMALL_PROGRAMS = {"audio", "diffusion", "dit", "flash_vae", "kernels", "nn", "parity", "rewards", "streaming", "text", "training"}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Compiles without most optimisations in the packages of small models."""
    if request.path.parent.name not in _SMALL_PROGRAMS:
        yield
        return
    import jax  # not before the settings above

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
