"""`serve.py --listen --output`: a session that the command line begins, put out as MPEG-TS on standard output, or as RTP."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from pikastream_jax.live.media import Broadcast
from pikastream_jax.live.mux import transport_stream
from pikastream_jax.live.rtp import RtpViewer
from pikastream_jax.serving.errors import ServeError
from pikastream_jax.serving.outputs import check_stdout, check_writable, stdout_writer, write_whole
from pikastream_jax.serving.rtp import parse_destination

WAITING = 64  # pieces; what a reader leaves lying beyond them is lost at the broadcast


def check_outlet(output: str, sdp: Path) -> None:
    """Complains early.

    Raises:
      ServeError: `output` is none that a live session has, or cannot be written.
    """
    if output == "-":
        check_stdout()
    elif output.startswith("rtp:"):
        parse_destination(output)
        check_writable(sdp)
    else:
        raise ServeError(f"--listen --output {output}: a live session goes to - (MPEG-TS) or rtp://HOST:PORT; --record DIR keeps it as a file")


async def put_out(broadcast: Broadcast, output: str, sdp: Path, say: Callable[[str], None]) -> None:
    """Returns when the session ends or the reader goes away.

    Raises:
      ServeError: nothing can be written.
    """
    if output == "-":
        await _to_stdout(broadcast)
        return
    viewer = RtpViewer(broadcast, parse_destination(output))
    try:
        try:
            write_whole(sdp, await viewer.description())
        except (OSError, RuntimeError) as error:
            raise ServeError(f"--output {output}: {error}") from error
        say(f"sending; watch with: ffplay -protocol_whitelist file,udp,rtp {sdp}")
        await viewer.ended()
    finally:
        await viewer.close()


async def _to_stdout(broadcast: Broadcast) -> None:
    """A thread writes, because a reader that pauses would stop whoever does; a daemon, because it may never read again."""
    pieces: queue.Queue[bytes] = queue.Queue(WAITING)
    failures: list[OSError] = []

    def write() -> None:
        out = stdout_writer()
        try:
            while True:
                out(pieces.get())
        except OSError as error:
            failures.append(error)

    threading.Thread(target=write, name="stdout", daemon=True).start()
    async with contextlib.aclosing(transport_stream(broadcast)) as stream:
        async for piece in stream:
            while pieces.full() and not failures:
                await asyncio.sleep(0.01)
            if failures:
                break
            pieces.put_nowait(piece)
    for _ in range(100):  # what was made is still written, if it is read
        if pieces.empty() or failures:
            break
        await asyncio.sleep(0.01)
    if failures and not isinstance(failures[0], BrokenPipeError):
        raise ServeError(f"cannot write to standard output: {failures[0].strerror}")
