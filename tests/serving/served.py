"""What the tests of the HTTP server send, what they read in its replies, and how they hold it up."""

import asyncio
import base64
import threading
from contextlib import contextmanager

from httpx import ASGITransport, AsyncClient

SAY = {"messages": [{"role": "user", "content": "a red star"}]}


def sent(path):
    return {"type": "image", "data": base64.b64encode(path.read_bytes()).decode()}


def captions(reply):
    assert reply.status_code == 200, reply.text
    return [hit["caption"] for hit in reply.json()["hits"]]


@contextmanager
def held(app, monkeypatch, name="search"):
    """The model's thread held up at its first request, to see what it is given when it goes on."""
    given, begun, go = [], threading.Event(), threading.Event()
    work = getattr(app.state.handler.worker, name)

    def wait(asked):
        given.append(len(asked))
        begun.set()
        assert go.wait(60)
        return work(asked)

    monkeypatch.setattr(app.state.handler.worker, name, wait)
    try:
        yield given, begun, go
    finally:
        go.set()


async def until(true):
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


def running(app, case):
    """Run a coroutine function that is given a client."""

    async def run():
        async with app.router.lifespan_context(app), AsyncClient(transport=ASGITransport(app), base_url="http://a") as c:
            await case(c)

    asyncio.run(run())
