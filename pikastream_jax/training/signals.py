"""SIGTERM and Ctrl-C as a request to stop after the current update."""

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Iterator


class StopRequest:
    """Becomes true, with the signal's name, once the process has been asked to stop."""

    def __init__(self):
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """While open, the first SIGTERM or SIGINT only sets the request; a second one acts as it did before.

    In a child of `multiprocessing` a second one does nothing more: the same wish comes to it by several ways, from the process that started it,
    by that one's death and from whoever ends a whole group of processes.

    Python runs signal handlers in the main thread alone; opened in another thread, the request stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number, frame):
        del frame
        request.name = signal.Signals(number).name
        if multiprocessing.parent_process() is None:
            restore()  # whoever asks twice does not want to wait for the checkpoint

    try:
        for number in previous:
            signal.signal(number, handle)
        yield request
    finally:
        restore()
