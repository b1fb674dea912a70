"""`serve.py --listen`: the model, the engine and the server together, until Ctrl-C."""

import asyncio
import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pikastream_jax.live.engine import Engine
from pikastream_jax.live.model import LiveModel, StreamModel
from pikastream_jax.serving.errors import ServeError

CHUNK = 2  # latent frames: what a word waits for is a chunk and the time to make one
TOKEN = "PIKASTREAM_TOKEN"


@dataclasses.dataclass(frozen=True)
class ListenOptions:
    """How to listen.

    Attributes:
      address: HOST:PORT.
      sessions: most that are admitted; None: as many as the machine serves in real time.
      rows: sessions of one step.
      origins: of other sites whose pages may use the service.
      label: whether pictures say that they are generated.
      numbers: whether they carry their number, to measure latency.
      recordings: folder in which every session is kept.
    """

    address: str
    weights: Path | None
    stream: dict[str, Any]
    sessions: int | None = None
    rows: int = 1
    origins: tuple[str, ...] = ()
    label: bool = True
    numbers: bool = False
    recordings: Path | None = None


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT, or a port alone on this machine.

    Raises:
      ServeError: it is neither.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 <= int(port) < 65536:
        raise ServeError(f"--listen {text}: {port!r} is no port; write HOST:PORT, such as 127.0.0.1:8080")
    return host.strip("[]") or "127.0.0.1", int(port)


def listen(options: ListenOptions, say: Callable[[str], None], model: LiveModel | None = None) -> int:
    """Serves until it is told to stop.

    Args:
      model: instead of the one that `options` name.

    Raises:
      ServeError: the address, the token or the model will not do, or a package is missing.
    """
    host, port = parse_address(options.address)
    try:
        from aiohttp import web

        from pikastream_jax.live.access import Access, is_loopback
        from pikastream_jax.live.hub import Limits
        from pikastream_jax.live.server import application
    except ImportError as error:
        raise ServeError(f'--listen needs {error.name}: pip install "pikastream-jax[live]"') from error
    try:
        access = Access(host, os.environ.get(TOKEN), options.origins)
    except ValueError as error:
        raise ServeError(str(error)) from error
    if options.recordings is not None and not options.recordings.is_dir():
        raise ServeError(f"--record {options.recordings}: there is no such directory; make it first")
    if model is None:
        from pikastream_jax.streaming.generator import load_generator

        try:
            generator = load_generator(options.weights, **({"chunk": CHUNK} | options.stream))
            model = StreamModel(generator, options.rows)
        except (OSError, ValueError) as error:
            raise ServeError(f"cannot load the model: {' '.join(str(error).split())}") from error
    engine = Engine(model, options.sessions)
    steps = engine.steps
    say(f"a chunk of {1e3 * engine.chunk_seconds:.0f} ms takes {1e3 * steps.p50:.0f} ms (95th percentile {1e3 * steps.p95:.0f}): {engine.capacity} sessions at a time")
    if not engine.capacity:
        say("warning: this machine is too slow for one session in real time; all will be refused (try --steps 2)")

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        runner = web.AppRunner(application(engine, access, Limits(), label=options.label, numbers=options.numbers, recordings=options.recordings), access_log=None)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                raise ServeError(f"cannot listen at {host}:{port}: {error.strerror}; choose another address") from error
            at = runner.addresses[0]
            say(f"listening at http://{at[0] if ':' not in at[0] else f'[{at[0]}]'}:{at[1]}/" + ("" if is_loopback(host) else "#token=..."))
            await stop.wait()
        finally:
            await runner.cleanup()

    try:
        asyncio.run(serve())
    finally:
        engine.close()
    sys.stdout.flush()
    return 0
