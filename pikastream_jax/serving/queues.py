"""A bounded queue that can end: the only place where two stages of the pipeline meet."""

import collections
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Cancelled(Exception):
    """The queue was cancelled: nothing put into it will be read any more."""


class BoundedQueue(Generic[T]):
    """FIFO of at most `capacity` items between one producer and one consumer.

    `close` is the producer's "no more": what is queued is still read. `cancel` drops what is queued and frees
    both sides at once. (`queue.Queue.shutdown` does this from Python 3.13 on.)
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"a queue of capacity {capacity} can hold nothing; it must be at least 1")
        self._capacity = capacity
        self._items: collections.deque[T] = collections.deque()
        self._closed = False
        self._cancelled = False
        self._changed = threading.Condition()

    def put(self, item: T) -> None:
        """Adds `item`, waiting while the queue is full.

        Raises:
          Cancelled: the consumer is gone.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or len(self._items) < self._capacity)
            if self._cancelled:
                raise Cancelled
            self._items.append(item)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._cancelled or self._closed or self._items)
                if self._cancelled or not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._items.clear()
            self._changed.notify_all()
