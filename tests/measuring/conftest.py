import pytest

from pikastream_jax.measuring.estimator import Estimator


@pytest.fixture(scope="session")
def estimator():
    return Estimator()
