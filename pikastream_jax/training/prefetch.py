"""Batches of the coming updates, made in a thread of their own while the device works on this one."""

import collections
import concurrent.futures
from collections.abc import Sequence

from jaxtyping import Array, PyTree


class Prefetch:
    """Takes `batches[first]`, `batches[first + 1]`, ... in order, the next few always in the making.

    One thread: an element is a function of its number alone, so that more would change nothing but the load. A grain `MapDataset` can be
    indexed from anywhere, which is how a run that is continued starts at its own step.
    """

    def __init__(self, batches: Sequence[PyTree[Array]], first: int, last: int, ahead: int = 2):
        """
        Args:
          batches: element n is the batch of update n.
          first: number of the first batch to take.
          last: number of the first batch not to make.
          ahead: batches in the making beside the one that is taken.
        """
        self._batches, self._next, self._last = batches, first, last
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._made: collections.deque[concurrent.futures.Future] = collections.deque()
        for _ in range(ahead):
            self._make()

    def take(self) -> PyTree[Array]:
        """The next batch; what was raised while it was made is raised here.

        Raises:
          IndexError: `last` batches were taken.
        """
        self._make()
        return self._made.popleft().result()

    def close(self) -> None:
        """Waits for the batch that is being made and leaves out the others."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self) -> None:
        if self._next < self._last:
            self._made.append(self._thread.submit(self._batches.__getitem__, self._next))
            self._next += 1
