"""`serve.py --listen`: the model, the engine and the server together, until Ctrl-C."""

import asyncio
import dataclasses
import functools
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
      ray: replicas, `N` or `MIN:MAX`, each of `sessions` (1 where that is None), by Ray Serve.
      output: where a session goes that begins with the server, `-` or `rtp://HOST:PORT`; None begins none.
      sdp: where to describe it for players, over RTP.
      image, avatar, prompt, seed: of that session.
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
    ray: str | None = None
    output: str | None = None
    sdp: Path = Path("stream.sdp")
    image: Path | None = None
    avatar: str | None = None
    prompt: str = "a person talking"
    seed: int = 0


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT, or a port alone on this machine.

    Raises:
      ServeError: it is neither.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 <= int(port) < 65536:
        raise ServeError(f"--listen {text}: {port!r} is no port; write HOST:PORT, such as 127.0.0.1:8080")
    return host.strip("[]") or "127.0.0.1", int(port)


def listen(options: ListenOptions, say: Callable[[str], None], build: Callable[[], LiveModel] | None = None) -> int:
    """Serves until it is told to stop.

    Args:
      build: makes another model than the one that `options` name.

    Raises:
      ServeError: the address, the token or the model will not do, or a package is missing.
    """
    host, port = parse_address(options.address)
    try:
        from pikastream_jax.live.access import Access
        from pikastream_jax.live.hub import Limits
        from pikastream_jax.live.outlet import check_outlet
        from pikastream_jax.live.server import application
    except ImportError as error:
        raise ServeError(f'--listen needs {error.name}: pip install "pikastream-jax[live]"') from error
    try:
        access = Access(host, os.environ.get(TOKEN), options.origins)
    except ValueError as error:
        raise ServeError(str(error)) from error
    if options.recordings is not None and not options.recordings.is_dir():
        raise ServeError(f"--record {options.recordings}: there is no such directory; make it first")
    if options.output is not None:
        check_outlet(options.output, options.sdp)
    weights, recordings = (None if path is None else path.resolve() for path in (options.weights, options.recordings))
    build = build or functools.partial(load_model, weights, options.stream, options.rows)
    drawn = {"label": options.label, "numbers": options.numbers, "recordings": recordings}
    if options.ray is not None:
        return _listen_with_replicas(options, say, build, (host, port), access, drawn)
    try:
        engine = Engine(build(), options.sessions)
    except (OSError, ValueError) as error:
        raise ServeError(f"cannot load the model: {' '.join(str(error).split())}") from error
    steps = engine.steps
    say(f"a chunk of {1e3 * engine.chunk_seconds:.0f} ms takes {1e3 * steps.p50:.0f} ms (95th percentile {1e3 * steps.p95:.0f}): {engine.capacity} sessions at a time")
    if not engine.capacity:
        say("warning: this machine is too slow for one session in real time; all are refused until it is faster")
    try:
        asyncio.run(_serve(application(engine, access, Limits(), **drawn), host, port, say, None if options.output is None else options))
    finally:
        engine.close()
    sys.stdout.flush()
    return 0


def load_model(weights: Path | None, stream: dict[str, Any], rows: int) -> LiveModel:
    """The streaming generator for live sessions.

    Raises:
      OSError, ValueError: the weights or the way to stream will not do.
    """
    from pikastream_jax.streaming.generator import load_generator

    return StreamModel(load_generator(weights, **({"chunk": CHUNK} | stream)), rows)


def _listen_with_replicas(options: ListenOptions, say: Callable[[str], None], build: Callable[[], LiveModel], at: tuple[str, int], access, drawn: dict[str, Any]) -> int:
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ServeError(f'--ray needs {error.name}: pip install "pikastream-jax[live,ray]"') from error
    from pikastream_jax.live.access import is_loopback
    from pikastream_jax.live.cluster import Cluster, parse_replicas
    from pikastream_jax.live.hub import Limits

    replicas, slots = parse_replicas(options.ray), options.sessions or 1
    cluster = Cluster(replicas, build, slots, loopback=is_loopback(at[0]), **drawn)
    try:
        from pikastream_jax.live.gateway import gateway_application

        say(f"{cluster.running()} replicas of {slots} sessions each")
        asyncio.run(_serve(gateway_application(cluster.handle, cluster.secret, access, Limits(), slots, cluster.running), *at, say, None))
    finally:
        cluster.close()
    return 0


async def _serve(app, host: str, port: int, say: Callable[[str], None], house: ListenOptions | None) -> None:
    """Listens until told to stop, or until the session of the command line ends."""
    from aiohttp import web

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ServeError(f"cannot listen at {host}:{port}: {error.strerror}; choose another address") from error
        at = runner.addresses[0]
        say(f"listening at http://{at[0] if ':' not in at[0] else f'[{at[0]}]'}:{at[1]}/" + ("" if os.environ.get(TOKEN) is None else "#token=..."))
        ends = [asyncio.create_task(stop.wait())]
        if house is not None:
            ends.append(asyncio.create_task(_keep_house(app, house, say)))
        done, others = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        await asyncio.gather(*done)
    finally:
        await runner.cleanup()


async def _keep_house(app, options: ListenOptions, say: Callable[[str], None]) -> None:
    """The session that the command line asks for, to its output."""
    from pikastream_jax.live.hub import HUB, Refused, Wanted
    from pikastream_jax.live.outlet import put_out

    try:
        image = None if options.image is None else options.image.read_bytes()
        room = await app[HUB].open(Wanted("command line", options.avatar, image, True, options.prompt, options.seed))
    except (OSError, Refused) as error:
        raise ServeError(f"--output {options.output}: {error}") from error
    room.permanent = True
    say(f"session {room.id} goes to {'standard output' if options.output == '-' else options.output}")
    await put_out(room.broadcast, options.output, options.sdp, say)
