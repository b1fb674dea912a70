"""Batches of the coming updates, made in threads of their own while the device works on this one."""

import collections
import concurrent.futures
import os
from collections.abc import Sequence

from jaxtyping import Array, PyTree


class Prefetch:
    """Takes `batches[first]`, `batches[first + 1]`, ... in order, the next few always in the making.

    An element is a function of its number alone, so it is the same whichever thread makes it. A grain `MapDataset` can be indexed from
    anywhere, which is how a run that is continued starts at its own step. A core reads and cuts some thousand clips a second, and a fast
    device wants more: a quarter of the cores are kept at it, which on a small machine is one.
    """

    def __init__(self, batches: Sequence[PyTree[Array]], first: int, last: int, ahead: int | None = None):
        """
        Args:
          batches: element n is the batch of update n.
          first: number of the first batch to take.
          last: number of the first batch not to make.
          ahead: batches in the making beside the one that is taken; by default two for each thread.
        """
        self._batches, self._next, self._last = batches, first, last
        threads = max(1, (os.cpu_count() or 1) // 4)
        ahead = 2 * threads if ahead is None else ahead
        self._threads = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="batches")
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
        """Waits for the batches that are being made and leaves out the others."""
        self._threads.shutdown(cancel_futures=True)

    def _make(self) -> None:
        if self._next < self._last:
            self._made.append(self._threads.submit(self._batches.__getitem__, self._next))
            self._next += 1
