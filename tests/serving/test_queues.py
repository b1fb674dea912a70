import threading
import time

import pytest

from pikastream_jax.serving.queues import BoundedQueue, Cancelled


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_items_arrive_in_order_and_closing_ends_the_reading():
    queue = BoundedQueue(2)

    def produce():
        for item in range(100):
            queue.put(item)
        queue.close()

    in_thread(produce)
    assert list(queue) == list(range(100))


def test_a_full_queue_makes_the_producer_wait():
    queue, put = BoundedQueue(2), []

    def produce():
        for item in range(5):
            queue.put(item)
            put.append(item)

    in_thread(produce)
    time.sleep(0.1)
    assert put == [0, 1]
    assert next(iter(queue)) == 0
    time.sleep(0.1)
    assert put == [0, 1, 2]


def test_cancelling_frees_both_sides():
    full, empty, seen = BoundedQueue(1), BoundedQueue(1), []
    full.put(0)

    def produce():
        try:
            full.put(1)
        except Cancelled:
            seen.append("producer")

    def consume():
        seen.extend(empty)
        seen.append("consumer")

    threads = [in_thread(produce), in_thread(consume)]
    time.sleep(0.05)
    full.cancel()
    empty.cancel()
    for thread in threads:
        thread.join(2)
    assert sorted(seen) == ["consumer", "producer"]
    assert list(full) == []


def test_capacity_is_checked():
    with pytest.raises(ValueError, match="capacity 0"):
        BoundedQueue(0)
