"""The HTTP server under load and at its end: what waits, what is refused, what is taken back."""

import asyncio
import importlib
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.request import urlopen

import pytest
import uvicorn
from served import SAY, captions, held, running, sent, until

from fromage.errors import UserError
from fromage.generation.preset import Preset
from fromage.models.fromage import Fromage
from fromage.serving.app import _Server, create_app, serve
from fromage.serving.batching import Capacity


def test_requests_that_come_meanwhile_are_answered_together_as_alone(app, client, monkeypatch, folder):
    queries = ["a red star", [sent(folder / "red.png")], ["a", sent(folder / "red.png")], "a blue ring", "x"]
    queries[2][0] = {"type": "text", "text": "a"}
    alone = [captions(client.post("/search", json={"query": query, "k": 3})) for query in queries]

    async def case(client):
        with held(app, monkeypatch) as (given, begun, go):
            tasks = [asyncio.create_task(client.post("/search", json={"query": "first"}))]
            await until(begun.is_set)
            tasks += [asyncio.create_task(client.post("/search", json={"query": query, "k": 3})) for query in queries]
            await until(lambda: app.state.handler.batcher.waiting == len(queries))
            go.set()
            replies = await asyncio.gather(*tasks)
        assert given == [1, 5] and [captions(reply) for reply in replies[1:]] == alone

    running(app, case)


def test_beyond_the_queue_it_is_429_and_in_time_504(model, index, monkeypatch):
    app = create_app(model, index, Preset(style="plain"), Capacity(queue=2, timeout=1.0))

    async def case(client):
        with held(app, monkeypatch) as (_, begun, _):
            tasks = [asyncio.create_task(client.post("/search", json={"query": "a"}))]
            await until(begun.is_set)
            tasks += [asyncio.create_task(client.post("/search", json={"query": "a"})) for _ in range(2)]
            await until(lambda: app.state.handler.batcher.waiting == 2)
            for path, body in (("/search", {"query": "a"}), ("/chat", SAY), ("/chat", SAY | {"stream": True})):
                refused = await client.post(path, json=body)
                assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert [reply.status_code for reply in await asyncio.gather(*tasks)] == [504] * 3
            assert app.state.handler.batcher.waiting == 0, "taken back"

    running(app, case)


def test_beyond_what_may_be_at_hand_no_request_is_read(model, index, monkeypatch):
    app = create_app(model, index, Preset(style="plain"), Capacity(batch_size=1, queue=1))

    async def case(client):
        async def never():
            begun.append(True)
            await asyncio.sleep(60)
            yield b""

        begun = []
        tasks = [asyncio.create_task(client.post("/search", content=never())) for _ in range(2)]
        await until(lambda: len(begun) == 2)
        refused = await client.post("/search", content=never())
        assert refused.status_code == 429 and refused.headers["retry-after"] and len(begun) == 2
        assert (await client.get("/healthz")).status_code == 200
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert (await client.post("/search", json={"query": "a"})).status_code == 200, "there is room again"

    running(app, case)


def test_bodies_that_only_begin_keep_nobody_out(model, index, monkeypatch):
    monkeypatch.setattr("fromage.serving.body_limit.SLOW", 0.3)
    app = create_app(model, index, Preset(style="plain"), Capacity(batch_size=1, queue=1))

    async def case(client):
        async def drip():
            while True:
                begun.append(True)
                await asyncio.sleep(0.05)
                yield b" "

        begun = []
        tasks = [asyncio.create_task(client.post("/search", content=drip())) for _ in range(2)]
        await until(lambda: len(begun) >= 2)
        assert (await client.post("/search", json={"query": "a"})).status_code == 429, "they may be about to end"
        await asyncio.sleep(0.4)
        for _ in range(3):
            assert (await client.post("/search", json={"query": "a"})).status_code == 200
        ended = [task for task in tasks if task.done()]
        assert len(ended) == 1 and ended[0].result().status_code == 408, "one place was needed"
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert (await client.post("/search", json={"query": "a"})).status_code == 200

    running(app, case)


def test_an_image_asked_for_by_its_id_has_a_time_out_and_makes_no_other_wait(model, index, monkeypatch):
    app, go = create_app(model, index, Preset(style="plain"), Capacity(timeout=1.0)), threading.Event()
    monkeypatch.setattr(app.state.handler.ids, "open", lambda name: go.wait(30))

    async def case(client):
        slow = [asyncio.create_task(client.get("/images/" + "0" * 16)) for _ in range(20)]
        red = {"type": "image", "data": sent(Path(index.items[0].path))["data"]}
        assert captions(await client.post("/search", json={"query": [red], "k": 1})) == ["red"]
        assert {reply.status_code for reply in await asyncio.gather(*slow)} == {504}
        go.set()

    running(app, case)


def test_a_host_that_is_slow_makes_only_those_wait_who_ask_for_it(model, index, monkeypatch):
    app, go, asked = create_app(model, index, Preset(style="plain"), Capacity(timeout=20)), threading.Event(), []

    def fetch(url, max_age):
        asked.append(url)
        assert go.wait(20)
        raise UserError(f"{url}: too slow")

    monkeypatch.setattr("fromage.serving.request_handler.fetch_image", fetch)

    async def case(client):
        query = {"query": [{"type": "url", "url": "https://images.example/a.jpg"}]}
        slow = [asyncio.create_task(client.post("/search", json=query)) for _ in range(20)]
        await until(lambda: len(asked) == 8)
        red = {"type": "image", "data": sent(Path(index.items[0].path))["data"]}
        assert captions(await client.post("/search", json={"query": [red], "k": 1})) == ["red"]
        go.set()
        assert {reply.status_code for reply in await asyncio.gather(*slow)} == {400}

    running(app, case)


def test_closing_refuses_what_waits_and_answers_what_runs(app, monkeypatch):
    async def case(client):
        with held(app, monkeypatch) as (_, begun, go):
            tasks = [asyncio.create_task(client.post("/search", json={"query": "a"}))]
            await until(begun.is_set)
            tasks += [asyncio.create_task(client.post("/chat", json=SAY | {"stream": way})) for way in (False, True)]
            await until(lambda: app.state.handler.batcher.waiting == 2)
            app.state.handler.batcher.close()
            go.set()
            assert [reply.status_code for reply in await asyncio.gather(*tasks)] == [200, 503, 503]
        assert (await client.get("/healthz")).status_code == 503

    running(app, case)


LONG = {"max_new_tokens": 480, "min_new_tokens": 480, "max_images": 0}  # seconds of decoding


@pytest.fixture
def address(app):
    """Host and port of a real server, in a thread."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = _Server(uvicorn.Config(app, log_level="error"), app.state.handler)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield listening.getsockname()
    server.should_exit = True
    thread.join()


def post(address, path, body):
    """A request that is sent, and how to read its response."""
    connection = HTTPConnection(*address, timeout=30)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    return connection, connection.getresponse


def test_closing_a_stream_stops_its_decoding(app, address, monkeypatch):
    put, over, work = [], threading.Event(), app.state.handler.worker.stream

    def counted(asked):
        ((request, send),) = asked
        done = work([(request, lambda piece: put.append(piece) or send(piece))])
        over.set()
        return done

    monkeypatch.setattr(app.state.handler.worker, "stream", counted)
    connection, response = post(address, "/chat", SAY | {"stream": True, "decoding": LONG})
    reply = response()
    assert reply.readline() == b"event: text\n"
    reply.close()
    connection.close()
    assert over.wait(20) and len(put) < 400


def test_an_answer_nobody_waits_for_is_not_decoded_to_its_end(app, address, monkeypatch):
    worker, begun, over = app.state.handler.worker, threading.Event(), threading.Event()
    work, asked, tokens, left = worker.chat, [], [], []

    def chat(requests):
        asked.extend(requests)
        try:
            return work(requests)
        finally:
            over.set()

    def between():
        tokens.append(1)
        if len(tokens) == 3:
            begun.set()
            left.append(asked[0].gone.wait(60))

    monkeypatch.setattr(worker, "chat", chat)
    monkeypatch.setattr(worker, "between", between)
    connection, _ = post(address, "/chat", SAY | {"decoding": LONG})
    assert begun.wait(60)
    connection.close()
    assert over.wait(20) and left == [True] and len(tokens) == 3


def test_who_has_gone_is_not_answered(app, address, monkeypatch):
    with held(app, monkeypatch) as (given, begun, go):
        first = post(address, "/search", {"query": "a"})
        assert begun.wait(60)
        gone = [post(address, "/search", {"query": "a"})[0], post(address, "/chat", SAY)[0]]
        gone.append(post(address, "/chat", SAY | {"stream": True})[0])
        asyncio.run(until(lambda: app.state.handler.batcher.waiting == 3))
        for connection in gone:
            connection.close()
        asyncio.run(until(lambda: app.state.handler.batcher.waiting == 0))
        go.set()
        assert first[1]().status == 200 and given == [1]


SERVER = """
from fromage.generation.preset import Preset
from fromage.models.fromage import Fromage
from fromage.serving.app import Capacity, serve
serve(Fromage.load(k=2, q=32), None, Preset(style="plain"), "127.0.0.1", 0, Capacity(timeout=60))
"""


def test_sigterm_finishes_what_runs_and_refuses_what_waits():
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline().split()[0].rpartition(":")[2])
        address = ("127.0.0.1", port)
        _, response = post(address, "/chat", SAY | {"stream": True, "decoding": LONG})
        running = response()  # its first piece is there
        _, waiting = post(address, "/chat", SAY)
        asyncio.run(until(lambda: json.load(urlopen(f"http://127.0.0.1:{port}/healthz"))["waiting"]))
        process.send_signal(signal.SIGTERM)
        refused = waiting()
        assert refused.status == 503 and refused.headers["retry-after"]
        assert running.read().split(b"\n\n")[-2].startswith(b"event: done")
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_connections_are_limited_and_an_address_with_colons_stands_in_brackets(model, monkeypatch, capsys):
    configs, create = [], socket.create_server
    monkeypatch.setattr(_Server, "run", lambda self, sockets: configs.append(self.config) or sockets[0].close())
    monkeypatch.setattr(socket, "create_server", lambda address, family: create(("127.0.0.1", 0)))
    for host in ("::1", "127.0.0.1"):
        serve(model, None, Preset(style="plain"), host, 0)
    shown = capsys.readouterr().out.split()
    assert shown[0].startswith("http://[::1]:") and "http://127.0.0.1:" in " ".join(shown)
    assert all(config.limit_concurrency for config in configs)


def test_an_address_that_cannot_be_had(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for host, port, other in (
            (*taken.getsockname(), "port"),
            ("127.0.0.1", 70_000, "port"),
            ("nowhere.invalid", 0, "host"),
        ):
            with pytest.raises(UserError, match=f"give another --{other}"):
                serve(model, None, Preset(style="plain"), host, port)
    with pytest.raises(UserError, match="dialogue, plain"):
        create_app(model, preset=Preset(style="verse"))


def test_an_index_of_another_model_is_refused(index):
    with pytest.raises(UserError, match="built with checkpoint"):
        create_app(Fromage.load(k=1, q=32), index)


def test_the_front_page_leads_to_docs_that_need_no_other_server(client):
    front = client.get("/")
    assert front.url.path == "/docs" and "http" not in front.text.replace("http://testserver", "")
    assets = re.findall(r'(?:src|href)="([^"]+)"', front.text)
    assert any(name.endswith(".js") for name in assets) and any(name.endswith(".css") for name in assets)
    assert all(name.startswith("/") and client.get(name).status_code == 200 for name in assets)
    assert client.get("/openapi.json").json()["paths"].keys().isdisjoint({"/", "/docs"})


def test_without_its_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in ("app", "routes"):
        monkeypatch.delitem(sys.modules, f"fromage.serving.{name}")
    with pytest.raises(UserError, match=r"fastapi: pip install '\.\[serve\]'"):
        importlib.import_module("fromage.serving.app")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_search_passes_a_conversation_that_goes_on_as_if_alone(model, index, streamed, monkeypatch):
    """Searches arrive while an answer is decoded: each is answered before the answer ends, and neither changes."""
    app, tokens = create_app(model, index, Preset(style="plain")), 12
    said = SAY | {"decoding": {"max_new_tokens": tokens, "min_new_tokens": tokens, "ret_bias": 2}, "stream": streamed}
    batcher_of, order, text = app.state.handler, [], {"query": "a red star", "k": 6}

    async def case(client):
        alone, found = (await client.post("/chat", json=said)).text, (await client.post("/search", json=text)).json()
        begun, calls = asyncio.Event(), itertools.count()
        loop, pass_by = asyncio.get_running_loop(), batcher_of.batcher.let_pass

        def between():
            if next(calls) < 2:
                loop.call_soon_threadsafe(begun.set)
                deadline = time.monotonic() + 60
                while not batcher_of.batcher.waiting and time.monotonic() < deadline:
                    time.sleep(0.001)
            pass_by()

        monkeypatch.setattr(batcher_of.batcher, "let_pass", between)

        async def ask(path, body):
            reply = await client.post(path, json=body)
            order.append(path)
            return reply

        answer = asyncio.create_task(ask("/chat", said))
        await asyncio.wait_for(begun.wait(), 10)
        searches = [await ask("/search", text) for _ in range(2)]
        for hits in (reply.json()["hits"] for reply in searches):
            assert [hit["id"] for hit in hits] == [hit["id"] for hit in found["hits"]]
            assert [hit["score"] for hit in hits] == pytest.approx([hit["score"] for hit in found["hits"]], abs=1e-5)
        assert (await answer).text == alone
        assert order == ["/search", "/search", "/chat"]

    running(app, case)
