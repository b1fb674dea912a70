"""Three replicas of a very small preset on a local Ray cluster: one is killed in mid-stream. `make ray`."""

import asyncio
import http.client
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
from aiohttp import ClientSession, WSMsgType
from service import form, png

pytestmark = pytest.mark.ray


SERVER = """
import sys
from small_model import build
from pikastream_jax.live.listen import ListenOptions, listen
from pikastream_jax.serving.errors import ServeError
options = ListenOptions("127.0.0.1:0", None, {}, sessions=int(sys.argv[2]), label=False, ray=sys.argv[1])
try:
    sys.exit(listen(options, lambda text: print(text, file=sys.stderr, flush=True), build))
except ServeError as error:
    sys.exit(f"error: {error}")
"""


def serve(replicas, sessions=1, **more):
    """The process of a server. Ray's workers find the model by PYTHONPATH, which they inherit."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests/live'}"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen([sys.executable, "-c", SERVER, replicas, str(sessions)], stderr=subprocess.PIPE, text=True, env=environment, **more)


def start(replicas, sessions=1):
    """A server that is up, and its address."""
    process, said = serve(replicas, sessions), []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"listening at (http://\S+)/", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
            return process, found[1]
    raise AssertionError("".join(said))


@pytest.fixture(scope="module")
def address():
    process, at = start("3")
    yield at
    process.terminate()
    assert process.wait(60) == 0


def replicas():
    """Processes of replicas, with how many sessions each has."""
    found = {}
    for process in psutil.process_iter():
        try:
            if "ServeReplica" not in " ".join(process.cmdline()):
                continue
            for connection in process.net_connections("inet"):
                if connection.status != psutil.CONN_LISTEN:
                    continue
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{connection.laddr.port}/health", timeout=1) as answer:
                        text = answer.read().decode()
                except (OSError, http.client.HTTPException):  # Ray's own ports
                    continue
                if said := re.search(r'"sessions": (\d+)', text):
                    found[process.pid] = int(said[1])
        except psutil.Error:
            continue
    return found


class Watching:
    """A viewer who connects again when the connection is lost; moments at which pictures came."""

    def __init__(self, client, path):
        self.moments, self.lost = [], 0
        self.task = asyncio.create_task(self._watch(client, path))

    async def _watch(self, client, path):
        while True:
            try:
                async with client.ws_connect(path + "/video") as socket:
                    async for message in socket:
                        if message.type is WSMsgType.BINARY and message.data[0] == 0:
                            self.moments.append(time.monotonic())
            except OSError:
                pass
            except Exception as error:  # refused while the session moves
                assert getattr(error, "status", None) in (503, None), error
            self.lost += 1
            await asyncio.sleep(0.1)


async def report(client, path):
    async with client.get(path) as answer:
        return answer.status, await answer.json()


async def settled(client, ready):
    """Waits until so many slots are free."""
    for _ in range(300):
        if (await report(client, "/ready"))[1]["free"] == ready:
            return
        await asyncio.sleep(0.2)
    raise AssertionError("the replicas did not come back")


def test_one_is_killed_and_its_session_goes_on_elsewhere(address):
    async def run():
        async with ClientSession(address) as client:
            async with client.post("/api/sessions", data=form(png(), consent="true", prompt="a person smiling", seed="5")) as answer:
                assert answer.status == 201, await answer.text()
                first = (await answer.json())["id"]
            before = replicas()
            (victim,) = [pid for pid, sessions in before.items() if sessions == 1]
            async with client.post("/api/sessions", json={"avatar": "ada"}) as answer:
                second = (await answer.json())["id"]
            paths = [f"/api/sessions/{name}" for name in (first, second)]
            viewers = [Watching(client, path) for path in paths]
            await asyncio.sleep(2.0)
            async with client.patch(paths[0], json={"prompt": "a person looking up"}) as answer:
                assert answer.status == 200
            await asyncio.sleep(1.0)
            told = [(await report(client, path))[1] for path in paths]
            psutil.Process(victim).kill()
            killed = time.monotonic()
            await asyncio.sleep(6.0)
            later = [(await report(client, path))[1] for path in paths]
            for viewer in viewers:
                viewer.task.cancel()
            gaps = [np.diff([moment for moment in viewer.moments if moment > killed - 1.0]).max() for viewer in viewers]
            print(f"\nthe session of the killed replica was away for {gaps[0]:.2f} s, the other's longest gap was {gaps[1]:.2f} s")
            assert gaps[0] < 5.0 and viewers[0].lost >= 1
            assert gaps[1] < 0.5 and viewers[1].lost == 0, "the other notices nothing"
            assert later[0]["prompt"] == "a person looking up" and later[0]["seed"] == 5 and later[0]["avatar"] is None
            assert told[0]["media_seconds"] < later[0]["media_seconds"] < told[0]["media_seconds"] + 6.5, "its clock goes on"
            assert later[1]["figures"]["frames"] > told[1]["figures"]["frames"] + 100
            async with client.get("/metrics") as answer:
                assert "pikastream_moves_total 1\n" in await answer.text()
            for path in paths:
                assert (await client.delete(path)).status == 204
            await settled(client, 3)

    asyncio.run(run())


def test_every_slot_is_used_and_the_one_too_many_is_refused(address):
    async def run():
        async with ClientSession(address) as client:
            await settled(client, 3)
            paths = []
            for _ in range(3):
                async with client.post("/api/sessions", json={}) as answer:
                    assert answer.status == 201, await answer.text()
                    paths.append(answer.headers["Location"])
            assert sorted(replicas().values()) == [1, 1, 1]
            async with client.post("/api/sessions", json={}) as answer:
                assert answer.status == 503 and answer.headers["Retry-After"] == "30"
                assert (await answer.json())["error"] == "3 sessions are served and all slots are taken: try again later"
            assert (await report(client, "/ready"))[0] == 503
            for path in paths:
                await client.delete(path)
            await settled(client, 3)

    asyncio.run(run())


def test_refusals_of_a_replica_come_through_the_gateway(address):
    async def run():
        async with ClientSession(address) as client:
            for fields, status, reason in (({"avatar": "nobody"}, 422, "no avatar is called"), ({"seed": -1}, 422, "out of range"), ({"face": 1}, 422, "unknown field face")):
                async with client.post("/api/sessions", json=fields) as answer:
                    assert answer.status == status and reason in (await answer.json())["error"]
            async with client.post("/api/sessions", data=form(png())) as answer:
                assert answer.status == 403
            status, answer = await report(client, "/api/sessions/none")
            assert status == 404 and "there is no session 'none'" in answer["error"]
            async with client.get("/") as page, client.get("/api/avatars") as avatars:
                assert page.status == 200 and len(await avatars.json()) > 3
            async with client.post("/api/sessions", json={}, headers={"Origin": "https://evil.example"}) as answer:
                assert answer.status == 403

    asyncio.run(run())


def test_speech_and_media_pass_through(address):
    async def run():
        async with ClientSession(address) as client:
            async with client.post("/api/sessions", json={}) as answer:
                path = answer.headers["Location"]
            async with client.ws_connect(path + "/audio?rate=16000") as socket:
                await socket.send_bytes(np.full(16_000, 8000).astype("<i2").tobytes())
                await socket.send_str("end")
                for _ in range(100):
                    if (await report(client, path))[1]["utterances"]:
                        break
                    await asyncio.sleep(0.1)
                else:
                    raise AssertionError("nothing was said")
                await socket.send_bytes(b"odd")
                assert "3 bytes are no 16-bit samples" in (await socket.receive_json())["error"]
            async with client.get(path + "/stream.ts") as answer:
                assert answer.headers["Content-Type"] == "video/mp2t"
                assert len(await answer.content.readexactly(188 * 20)) == 188 * 20
            assert (await client.delete(path)).status == 204

    asyncio.run(run())


def test_another_replica_comes_when_slots_are_taken():
    process, at = start("1:2")

    async def run():
        async with ClientSession(at) as client:
            assert (await report(client, "/health"))[1]["replicas"] == 1
            async with client.post("/api/sessions", json={}) as answer:
                assert answer.status == 201
            for _ in range(600):
                if (await report(client, "/health"))[1]["replicas"] == 2:
                    break
                await asyncio.sleep(0.2)
            async with client.post("/api/sessions", json={}) as answer:
                assert answer.status == 201, await answer.text()

    try:
        asyncio.run(run())
    finally:
        process.terminate()
        process.wait(60)


def test_a_replica_that_is_taken_away_keeps_its_session_to_the_end():
    """Ray takes the newest away, two minutes after slots were given back, and here that is the one whose session is left."""
    others = set(replicas())
    process, at = start("1:2", 2)

    async def sessions():
        found = await asyncio.to_thread(replicas)  # which takes a while, and pictures come meanwhile
        return sorted(count for pid, count in found.items() if pid not in others)

    async def opened(client):
        async with client.post("/api/sessions", json={}) as answer:
            assert answer.status == 201, await answer.text()
            return answer.headers["Location"]

    async def replicas_are(client, count, seconds):
        for _ in range(5 * seconds):
            if (await report(client, "/health"))[1]["replicas"] == count:
                return
            await asyncio.sleep(0.2)
        raise AssertionError(f"{(await report(client, '/health'))[1]}, not {count} replicas")

    async def run():
        async with ClientSession(at) as client:
            old = [await opened(client) for _ in range(2)]
            await replicas_are(client, 2, 120)
            kept = await opened(client)
            assert await sessions() == [1, 2]
            viewer = Watching(client, kept)
            for path in old:
                assert (await client.delete(path)).status == 204
            await replicas_are(client, 1, 240)
            draining = time.monotonic()
            await asyncio.sleep(10.0)
            assert await sessions() == [0, 1], "it is still there"
            new = await opened(client)  # at the other one: one that stops takes no more
            assert await sessions() == [1, 1]
            await asyncio.sleep(5.0)
            viewer.task.cancel()
            assert viewer.lost == 0 and np.diff([moment for moment in viewer.moments if moment > draining - 5.0]).max() < 0.5
            for path in (kept, new):
                assert (await client.delete(path)).status == 204
            for _ in range(300):
                if len(await sessions()) == 1:
                    return
                await asyncio.sleep(0.2)
            raise AssertionError("the replica did not go when its session had ended")

    try:
        asyncio.run(run())
    finally:
        process.terminate()
        process.wait(60)


def test_more_slots_than_a_machine_holds_are_refused_at_the_start():
    process = serve("1", 100_000)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert re.search(r"error: --ray: no replica comes up: .*this machine holds \d+ sessions in real time", said)
    assert "Traceback" not in said
