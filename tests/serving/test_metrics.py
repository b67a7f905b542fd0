"""What a server counts, read by Prometheus' own parser."""

import asyncio

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from served import SAY, held, running, until

from fromage.generation.preset import Preset
from fromage.models.prompts import prompt_length
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
