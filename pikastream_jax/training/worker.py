"""A process that runs command lines of this project, one after another, without starting anew for each."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path

import jax
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]  # where train.py is
COMPILED = ROOT / ".cache" / "jax"  # where JAX keeps programs, if the user has named no other place: a resumed run starts sooner


class Worker:
    """Runs commands such as ["train.py", "dit_sft", ...] or ["-m", "pikastream_jax.training.clips", ...] in a process of its own.

    Before the first command comes it has imported what trains and set up the device, so no command may choose the devices (`--cpu-devices`).
    """

    def __init__(self, niceness: int = 0):
        """
        Args:
          niceness: by how much other processes come before this one, see `os.nice`.
        """
        spawning = multiprocessing.get_context("spawn")  # a fork of a process that has used JAX would hang
        self._connection, there = spawning.Pipe()
        self._process = spawning.Process(target=_serve, args=(there, niceness), daemon=True)
        self._process.start()
        there.close()
        self._status: int | None = 0

    def run(self, command: list[str]) -> None:
        """Starts a command.

        Raises:
          RuntimeError: another still runs.
        """
        if self.status() is None:
            raise RuntimeError(f"{' '.join(command)}: the command before it still runs")
        self._status = None
        try:
            self._connection.send(command)
        except (BrokenPipeError, ConnectionResetError):
            self._status = self._ended()

    def status(self) -> int | None:
        """Exit status of the last command, 0 before the first; None while it runs."""
        if self._status is None:
            try:
                if self._connection.poll():
                    self._status = self._connection.recv()
            except (EOFError, ConnectionResetError):
                self._status = self._ended()
        return self._status

    def stop(self) -> None:
        """Asks the command to save and leave; without one the process ends."""
        if self._process.is_alive():
            self._process.terminate()

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._connection.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def _ended(self) -> int:
        self._process.join()
        return self._process.exitcode or 1


def _serve(commands: multiprocessing.connection.Connection, niceness: int) -> None:
    os.nice(niceness)
    os.setpgrp()  # a terminal's Ctrl-C goes to who gives the commands, who decides what it means
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is one between processes, which would be left behind when this one is killed
    jax.local_devices()
    while True:
        try:
            command = commands.recv()
        except (EOFError, ConnectionResetError):  # the latter where the last status was not read any more
            return
        status = _run(command)
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(BrokenPipeError):  # nobody asks any more
            commands.send(status)


def _leave_with_parent() -> None:
    """Whoever gives the commands may be killed: then the command that runs saves and leaves, as if it had been asked to."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)  # the thread that Python runs handlers in, and that sleeps


def _run(command: list[str]) -> int:
    """What the interpreter would do with that command line, and its exit status."""
    module = command[0] == "-m"
    sys.argv = command[1:] if module else command
    try:
        if module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
