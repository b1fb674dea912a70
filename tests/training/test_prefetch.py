import threading

import pytest

from pikastream_jax.training.prefetch import Prefetch


def test_elements_come_in_order_and_ahead_of_need():
    made, enough = [], threading.Event()

    class Source:
        def __getitem__(self, n):
            made.append(n)
            if n == 6:
                enough.set()
            return n * n

    batches = Prefetch(Source(), first=3, last=9, ahead=3)
    assert batches.take() == 9
    assert enough.wait(10), "three ahead of the one taken, though nobody asked"
    assert [batches.take() for _ in range(5)] == [16, 25, 36, 49, 64]
    with pytest.raises(IndexError):
        batches.take()
    batches.close()
    assert made == list(range(3, 9))


def test_an_error_belongs_to_its_element():
    class Source:
        def __getitem__(self, n):
            if n == 1:
                raise ValueError("torn")
            return n

    batches = Prefetch(Source(), 0, 3)
    assert batches.take() == 0
    with pytest.raises(ValueError, match="torn"):
        batches.take()
    batches.close()
