"""What one client cannot do to the others: hold connections, threads or the event loop, or speak through a browser."""

import asyncio
import base64
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager

import pytest
import uvicorn
from fastapi.testclient import TestClient
from hostile import endless
from served import sent

from fromage.images.decode_process import DECODERS
from fromage.serving.connections import limited
from fromage.serving.hosts import VARIABLE, HostGuard


async def answer(scope, receive, send):
    """An application that answers 'here'."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"here"})


@contextmanager
def listening(app, **how):
    """The application on a port of this machine. What fails in the meantime is told with what the server was doing."""
    protocol = limited(**how)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", http=protocol))
    socket_ = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([socket_],), daemon=True)
    thread.start()
    try:
        yield socket_.getsockname()
    except BaseException as error:
        frame = sys._current_frames().get(thread.ident)
        stack = "".join(traceback.format_stack(frame)) if frame else "its thread has ended"
        error.add_note(f"the server: open {dict(protocol.open)}, waiting {len(protocol.waiting)}\n{stack}")
        raise
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


@pytest.fixture
def long_heads(monkeypatch):
    """Heads may take so long that a connection which closes was closed for another reason."""
    monkeypatch.setattr("fromage.serving.connections.HEAD", 600.0)


def said(connection, seconds=60.0):
    """What comes until the server closes; None if it does not within so many seconds."""
    connection.settimeout(seconds)
    got = b""
    try:
        while data := connection.recv(4096):
            got += data
    except TimeoutError:
        return None
    except ConnectionError:
        pass
    return got


def test_a_head_that_does_not_end_is_cut_off_and_a_whole_one_is_answered():
    with listening(answer, seconds=0.3) as address:
        half, silent = socket.create_connection(address), socket.create_connection(address)
        half.sendall(b"GET / HTTP/1.1\r\nX: ")
        whole = socket.create_connection(address)
        whole.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(0.1)
        assert b"here" in whole.recv(4096)
        whole.sendall(b"GET / HTTP/1.1\r\n")  # the next head on the same connection
        assert [said(each) for each in (half, silent, whole)] == [b"", b"", b""]


def test_a_client_that_does_not_read_is_cut_off():
    async def flood(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        task = asyncio.create_task(receive())
        while not task.done() or (task.result()["type"] == "http.request" and (task := asyncio.create_task(receive()))):
            await send({"type": "http.response.body", "body": b"x" * (1 << 20), "more_body": True})
            await asyncio.sleep(0)
        flooded.set()

    flooded = threading.Event()
    with listening(flood, seconds=0.3) as address:
        client = socket.create_connection(address)
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert flooded.wait(60), "the answer is still being written"


WHOLE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def test_one_address_has_so_many_connections_and_gets_them_back(long_heads):
    async def later(scope, receive, send):
        begun.release()
        await asyncio.to_thread(go.wait, 300)
        await answer(scope, receive, send)

    go, begun = threading.Event(), threading.Semaphore(0)
    with listening(later, seconds=600, per_address=3) as address:
        held = [socket.create_connection(address) for _ in range(3)]
        for each in held:
            each.sendall(WHOLE)
        assert all(begun.acquire(timeout=60) for _ in held)
        assert said(socket.create_connection(address)) == b"", "those that are being answered keep their places"
        go.set()
        assert all(b"here" in said(each) for each in held)
        free = socket.create_connection(address)
        free.sendall(WHOLE)
        assert b"here" in said(free)


def test_half_sent_requests_make_room_for_whole_ones(long_heads):
    """One address began more requests than it has places, and goes on: it is answered all the same."""
    with listening(answer, seconds=600, per_address=3) as address:
        halves = []
        for _ in range(12):
            halves.append(socket.create_connection(address))
            halves[-1].sendall(b"GET / HTTP/1.1\r\nX: ")
        time.sleep(0.1)
        whole = socket.create_connection(address)
        whole.sendall(WHOLE)
        assert b"here" in said(whole)
        assert [said(half) for half in halves[:9]] == [b""] * 9, "the oldest went"
        halves[-1].sendall(b"a\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b"here" in said(halves[-1]), "the youngest stayed"


def test_any_number_of_unknown_fields_is_one_fault(client):
    body = {"query": "a"} | {f"{i:x}": 1 for i in range(50_000)}
    faults = client.post("/search", json=body).json()["detail"]
    assert len(faults) == 1 and faults[0]["type"] == "extra_forbidden"
    many = {"query": [{"type": "text", "text": 1}] * 64}
    assert len(client.post("/search", json=many).json()["detail"]) == 8


@pytest.mark.parametrize("value", [b"[]", b"{}", b'{"a":1}', b"1"])
def test_a_body_of_many_values_is_refused_before_it_is_parsed(client, monkeypatch, value):
    """Parsing one of 32 MiB takes ten seconds, in which nobody else is answered."""
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("it is parsed"))
    content = b'{"query":[' + b",".join([value] * 600_000) + b"]}"
    headers = {"content-type": "application/json"}
    replies = {path: client.post(path, content=content, headers=headers) for path in ("/search", "/v1/embeddings")}
    monkeypatch.undo()
    assert all(reply.status_code == 413 and "too many values" in reply.text for reply in replies.values())
    assert replies["/search"].json()["detail"] == replies["/v1/embeddings"].json()["error"]["message"]
    assert client.post("/search", json={"query": ",:[{" * 8000}).status_code == 400, (
        "a text of marks is parsed, and too long"
    )


def test_work_keeps_its_thread_when_its_client_has_gone(app, client, folder, monkeypatch):
    """Four threads open what is sent, however many clients hang up meanwhile."""
    running, most, go = [], [0], threading.Event()

    def slow(*_):
        running.append(1)
        most[0] = max(most[0], len(running))
        go.wait(5)
        running.pop()
        raise ValueError

    monkeypatch.setattr("fromage.serving.request_handler.decode_apart", slow)
    handler = app.state.handler

    async def hang_up():
        from fromage.serving.schema import SearchRequest

        request = SearchRequest.model_validate({"query": [sent(folder / "red.png")]})
        for _ in range(12):
            task = asyncio.create_task(handler.search(request))
            await asyncio.sleep(0.02)
            task.cancel()
        await asyncio.sleep(0.1)

    client.portal.call(hang_up)
    go.set()
    assert most[0] == 4


def test_an_image_that_decodes_without_end_is_given_up_and_the_server_answers_meanwhile(client, monkeypatch):
    monkeypatch.setattr(DECODERS, "seconds", 1.0)
    image = {"type": "image", "data": base64.b64encode(endless()).decode()}
    slow = threading.Thread(target=lambda: replies.append(client.post("/search", json={"query": [image]})))
    replies = []
    slow.start()
    began = time.monotonic()
    while slow.is_alive():
        asked = time.monotonic()
        assert client.get("/healthz").status_code == 200 and time.monotonic() - asked < 1
        time.sleep(0.05)
    assert replies[0].status_code == 400 and "longer than 1 s" in replies[0].json()["detail"]
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    ("host", "origin", "passes"),
    [
        ("localhost:8000", None, True),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ("[::1]:8000", None, True),
        ("192.168.0.7", None, True),
        ("gallery.example", None, True),  # the name it listens at
        ("proxy.example", "https://proxy.example", True),  # named by the user
        ("evil.example", None, False),
        ("localhost", "http://evil.example", False),
        ("localhost", "null", False),
        ("127.0.0.1:8000", "http://localhost:8000", True),
        ("192.168.0.7:8000", "http://192.168.0.7:8000", True),
        ("127.0.0.1:8000", "http://203.0.113.5", False),  # a page that lies at an address
        ("192.168.0.7", "http://192.168.0.8", False),
        ("localhost.evil.example", None, False),
        ("[::1", None, False),
        ("", None, False),
    ],
)
def test_other_names_are_refused(host, origin, passes, monkeypatch):
    monkeypatch.setenv(VARIABLE, "proxy.example, other.example")
    headers = {"host": host} | ({"origin": origin} if origin else {})
    reply = TestClient(HostGuard(answer, "gallery.example")).post("/", headers=headers)
    assert reply.status_code == (200 if passes else 403), reply.text
    assert passes or VARIABLE in reply.json()["detail"]
