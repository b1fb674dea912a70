"""A server over a model that is made up, and what its tests ask of it."""

import asyncio
import io

from aiohttp import FormData
from aiohttp.test_utils import TestClient, TestServer
from fake_model import FakeModel
from PIL import Image

from pikastream_jax.live.access import Access
from pikastream_jax.live.engine import Engine
from pikastream_jax.live.hub import Limits
from pikastream_jax.live.server import application


def png(size=(128, 128), colour=(9, 90, 200), kind="PNG"):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, kind)
    return data.getvalue()


def served(test, *, sessions=2, limits=None, access=None, numbers=False, model=None, recordings=None):
    """Runs `test(client, app)` against a server."""

    async def run():
        engine = Engine(model or FakeModel(seconds=0.01, size=256), sessions)
        engine._seconds.extend([0.01] * 256)  # as on a machine that does nothing else, which one that tests is not
        app = application(engine, access or Access("127.0.0.1"), limits or Limits(), label=False, numbers=numbers, recordings=recordings)
        try:
            async with TestClient(TestServer(app)) as client:
                return await test(client, app)
        finally:
            engine.close()

    return asyncio.run(run())


async def created(client, **fields):
    answer = await client.post("/api/sessions", json=fields)
    assert answer.status == 201, await answer.text()
    return await answer.json()


async def until(client, path, holds):
    """The report of a session as soon as it is as wanted; machines that test are busy ones."""
    for _ in range(200):
        report = await (await client.get(path)).json()
        if holds(report):
            return report
        await asyncio.sleep(0.05)
    raise AssertionError(report)


def form(image=None, **fields):
    body = FormData()
    for name, value in fields.items():
        body.add_field(name, value)
    if image is not None:
        body.add_field("image", image, filename="face.png")
    return body
