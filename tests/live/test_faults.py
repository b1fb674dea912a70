"""What goes wrong in the world: viewers who vanish or read slowly, a clock that jumps, a session that goes on elsewhere."""

import asyncio
import time

import numpy as np
import pytest
from aiohttp import ClientSession
from fake_model import FakeModel, picture
from service import created, served, until
from test_engine import collect

from pikastream_jax.live.engine import Engine
from pikastream_jax.live.hub import HUB, Wanted


@pytest.mark.parametrize("way", ["video", "stream.ts"])
def test_a_viewer_who_vanishes_is_forgotten(way):
    async def run(client, app):
        made = await created(client)
        path = f"/api/sessions/{made['id']}"
        async with ClientSession() as stranger:
            address = client.make_url(f"{path}/{way}")
            answer = await (stranger.ws_connect(address) if way == "video" else stranger.get(address))
            await until(client, path, lambda report: report["viewers"] == 1)
            # No closing word: the connection is torn down.
            (answer._response.connection if way == "video" else answer.connection).transport.abort()
            report = await until(client, path, lambda report: report["viewers"] == 0)
        await until(client, path, lambda later: later["figures"]["frames"] > report["figures"]["frames"] + 10)

    served(run)


def test_a_slow_viewer_loses_packets_and_holds_nobody_up():
    async def run(client, app):
        made = await created(client)
        path = f"/api/sessions/{made['id']}"
        room = app[HUB].rooms[made["id"]]
        slow, quick = room.broadcast.join(), room.broadcast.join()
        times = []

        async def watch():
            while (packet := await quick.take()) is not None:
                if packet.kind == "video":
                    times.append(packet.pts)

        task = asyncio.create_task(watch())
        await until(client, path, lambda report: report["figures"]["frames"] >= 75)
        task.cancel()
        assert slow.lost >= 100 and slow._packets.qsize() <= 100
        assert quick.lost == 0 and set(np.diff(times)) == {3600}
        first = await slow.take()
        assert first.kind == "video" and first.key and first.pts > times[0], "it goes on at a key frame"

    served(run)


def test_a_clock_that_jumps_moves_the_stream_and_no_more():
    """As after a sleep of the machine: ten seconds are gone, and neither made up for nor waited for."""
    jumped = [0.0]
    engine = Engine(FakeModel(), clock=lambda: time.monotonic() + jumped[0])
    try:
        session = engine.open(picture(7))

        async def jump():
            await asyncio.sleep(0.5)
            jumped[0] = 10.0

        found = asyncio.run(collect(session, 30, jump))
        came = np.array([moment for moment, _ in found])
        assert [frame.number for _, frame in found] == list(range(len(found)))
        assert 9.0 < session.figures.stalled < 11.0
        after = np.diff(came[-20:])
        assert np.median(after) == pytest.approx(0.04, abs=0.01), "no burst, no pause"
        assert np.diff(came).max() < 1.0
    finally:
        engine.close()


def test_a_session_goes_on_elsewhere_as_it_was():
    async def run(client, app):
        hub = app[HUB]
        room = await hub.open(Wanted("me", "grace", None, False, "a person smiling", 3))
        await hub.set_prompt(room, "a person looking sad")
        await hub.set_reference(room, "ada", None, False)
        path = f"/api/sessions/{room.id}"
        await until(client, path, lambda report: report["figures"]["frames"] >= 21)
        wanted = room.wanted
        assert wanted.media_time >= 0.8 and wanted.name == room.id
        await hub.close(room)
        again = await hub.open(wanted)
        report = await until(client, path, lambda report: report["figures"]["frames"] >= 4)
        assert again.id == room.id and report["avatar"] == "ada" and report["prompt"] == "a person looking sad"
        assert report["media_seconds"] == pytest.approx(wanted.media_time + report["figures"]["frames"] / 25, abs=0.05)
        once_more = await hub.open(again.wanted)  # where it still is, in its own place
        assert list(hub.rooms.values()) == [once_more] and len(hub.engine.sessions) == 1
        again = once_more
        changed = await hub.set_prompt(again, "a person")
        assert changed > wanted.media_time

    served(run, sessions=1)
