import os
import signal
import threading

import pytest

from pikastream_jax.training.signals import stop_on_signal


def test_the_first_signal_asks_and_the_second_acts():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts tests in the background has it ignored
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as request:
        assert not request
        os.kill(os.getpid(), signal.SIGINT)
        assert request and request.name == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_may_train():
    seen = []

    def work():
        with stop_on_signal() as request:
            seen.append(bool(request))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
