"""What a server counts, read by Prometheus' own parser."""

import asyncio
import json
import sys

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from served import SAY, held, running, until

from fromage.generation.preset import Preset
from fromage.models.prompts import prompt_length
from fromage.serving import error_guard
from fromage.serving.access import Access
from fromage.serving.app import create_app
from fromage.serving.batching import Capacity


@pytest.fixture
def fresh(model, index):
    return create_app(model, index, Preset(style="plain"), Capacity(timeout=20))


def samples(page):
    """name and labels -> value."""
    families = text_string_to_metric_families(page.text)
    order = ("route", "method", "status", "le")
    return {
        (one.name, *(one.labels[name] for name in order if name in one.labels)): one.value
        for family in families
        for one in family.samples
    }


def test_requests_times_and_tokens_are_counted(fresh, model):
    say = SAY | {"decoding": {"max_new_tokens": 5, "max_images": 0}}
    with TestClient(fresh) as client:
        for body in (say, say | {"stream": True}, {"messages": 1}):
            client.post("/chat", json=body)
        client.get("/images/" + "0" * 16)
        client.get("/images/" + "1" * 16)
        for name in ("a", "b", "%2e%2e/c"):
            client.get(f"/no/{name}")
        client.request("BREW", "/chat")
        client.post("/search", content=b" " * (33 << 20))
        page = client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=")
    counts = samples(page)
    requests = {name[1:]: value for name, value in counts.items() if name[0] == "fromage_requests_total"}
    assert requests == {
        ("/chat", "POST", "200"): 2,
        ("/chat", "POST", "422"): 1,
        ("/chat", "other", "405"): 1,
        ("/images/{name}", "GET", "404"): 2,
        ("other", "GET", "404"): 3,
        ("/search", "POST", "413"): 1,
    }
    assert counts["fromage_request_seconds_count", "/chat"] == 4 and counts["fromage_request_seconds_sum", "/chat"] > 0
    assert counts["fromage_request_seconds_bucket", "/chat", "+Inf"] == 4
    assert counts["fromage_generated_tokens_total",] == 10
    assert counts["fromage_prompt_tokens_total",] == 2 * prompt_length(model, "a red star")


def test_the_queue_is_as_long_as_what_waits(fresh, monkeypatch):
    async def case(client):
        with held(fresh, monkeypatch) as (_, begun, go):
            tasks = [asyncio.create_task(client.post("/search", json={"query": "a"}))]
            await until(begun.is_set)
            tasks += [asyncio.create_task(client.post("/search", json={"query": "a"})) for _ in range(3)]
            await until(lambda: fresh.state.handler.batcher.waiting == 3)
            assert samples(await client.get("/metrics"))["fromage_queue_length",] == 3
            go.set()
            await asyncio.gather(*tasks)
        assert samples(await client.get("/metrics"))["fromage_queue_length",] == 0

    running(fresh, case)


def test_an_error_of_the_server_is_told_in_the_clients_form_and_counted(model, index, monkeypatch):
    page, logged = "https://chat.example", []
    app = create_app(model, index, Preset(style="plain"), access=Access(origins=[page]))

    def broken(asked):
        raise RuntimeError("cuda error 77")

    for name in ("chat", "stream"):
        monkeypatch.setattr(app.state.handler.worker, name, broken)
    monkeypatch.setattr(error_guard.log, "exception", lambda told: logged.append(str(sys.exception())))
    openai = {"model": "fromage"} | SAY
    with TestClient(app) as client:
        bodies = [("/chat", SAY), ("/v1/chat/completions", openai), ("/v1/chat/completions", openai | {"stream": True})]
        replies = [client.post(path, json=body, headers={"origin": page}) for path, body in bodies]
        counts = samples(client.get("/metrics"))
    assert [reply.status_code for reply in replies] == [500] * 3
    assert {reply.headers["access-control-allow-origin"] for reply in replies} == {page}
    told = replies[0].json()["detail"]
    for reply in replies[1:]:
        assert reply.json()["error"] == {"message": told, "type": "server_error", "param": None, "code": None}
    assert "cuda" not in told and "log" in told and logged == ["cuda error 77"] * 3
    assert counts["fromage_requests_total", "/v1/chat/completions", "POST", "500"] == 2


@pytest.mark.parametrize("body", [SAY, SAY | {"stream": True}])
def test_a_client_that_leaves_is_no_time_out(fresh, monkeypatch, body):
    sent, messages = [], [{"type": "http.request", "body": json.dumps(body).encode()}]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/chat", "query_string": b"",
             "headers": [(b"content-type", b"application/json")], "server": ("a", 80), "client": ("b", 1)}  # fmt: skip

    async def send(message):
        sent.append(message)

    async def case(client):
        with held(fresh, monkeypatch) as (_, begun, go):
            first = asyncio.create_task(client.post("/search", json={"query": "a"}))
            await until(begun.is_set)

            async def receive():
                if messages:
                    return messages.pop()
                await until(lambda: fresh.state.handler.batcher.waiting == 1)
                return {"type": "http.disconnect"}

            await fresh(scope, receive, send)
            go.set()
            await first
        counts = samples(await client.get("/metrics"))
        assert counts["fromage_requests_total", "/chat", "POST", "none"] == 1 and sent == []

    running(fresh, case)
