"""One process at a time writes into a folder: two that train, render or solve into the same one would spoil both."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# What a file system answers that has no such locks (some network ones); there nobody watches.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}


@contextlib.contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Makes `folder` where it is missing and holds it; the system lets go of it when the process ends, however it does.

    Raises:
      ValueError: another process holds it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # the folder itself is locked, so no file is left behind
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing into {folder}: wait until it has ended, or name another folder with --out or --runs") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)
