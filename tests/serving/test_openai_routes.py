"""OpenAI's official client against a server, as it comes: its answers are those of our own routes."""

import base64
import json
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from served import SAY

from fromage.generation.preset import Preset
from fromage.images import fetch
from fromage.models.prompts import Starts, prompt_length
from fromage.retrieval.queries import embed_queries
from fromage.serving.app import create_app
from fromage.serving.batching import Capacity
from fromage.serving.connections import guarded, open_port
from fromage.serving.openai_requests import as_chat
from fromage.serving.openai_schema import ChatCompletionRequest, EmbeddingRequest
from fromage.serving.schema import PIXEL

NAME, STAR = "fromage", [{"role": "user", "content": "a red star"}]
WORDS = {"max_new_tokens": 6, "max_images": 0}
IMAGES = {"max_new_tokens": 6, "min_tokens": 2, "ret_bias": 1e4}


@pytest.fixture(scope="module")
def app_on_port(model, index):
    return create_app(model, index, Preset(style="plain"), Capacity(timeout=20))


@pytest.fixture(scope="module")
def server(app_on_port):
    """The address of the application on a port, after the guards of `fromage serve`."""
    listening = open_port("127.0.0.1", 0)
    running = uvicorn.Server(guarded(app_on_port, "127.0.0.1", 20, log_level="error"))
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    yield "http://127.0.0.1:{1}".format(*listening.getsockname())
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def official(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(official, messages=STAR, decoding=WORDS, **more):
    extra = {"decoding": decoding} | more.pop("extra", {})
    return official.chat.completions.create(model=NAME, messages=messages, extra_body=extra, **more)


def parts(server, decoding, said="a red star"):
    body = {"messages": [{"role": "user", "content": said}], "decoding": decoding}
    return httpx.post(f"{server}/chat", json=body).json()["message"]["content"]


def data_url(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def test_the_models(official):
    assert [model.id for model in official.models.list()] == [NAME] and official.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as refused:
        official.models.retrieve("gpt-4o")
    assert refused.value.code == "not_found" and "'fromage'" in str(refused.value)
    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        official.chat.completions.create(model="gpt-4o", messages=STAR)


def test_an_answer_of_words_is_a_string(official, server, model):
    reply = ask(official)
    (said,) = parts(server, WORDS)
    assert reply.choices[0].message.content == said["text"] and reply.choices[0].message.role == "assistant"
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (6, "length")
    text = said["text"]
    stop = next(text[start:] for start in range(len(text) - 1, -1, -1) if text.index(text[start:]) == start)
    for streamed in (False, True):
        ended = ask(official, stop=stop, max_tokens=6, stream=streamed)  # met at the last token
        last = list(ended)[-1] if streamed else ended
        assert last.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == prompt_length(model, "a red star") == reply.usage.total_tokens - 6
    first = ask(official, stop=said["text"][3:6], max_tokens=5000, temperature=0, decoding={"max_images": 0})
    assert first.choices[0].message.content == said["text"][:3] and first.choices[0].finish_reason == "stop"
    assert ask(official, max_completion_tokens=2).usage.completion_tokens == 2


def test_retrieved_images_are_parts_and_may_be_sent_back(official, server, app_on_port, folder):
    reply = ask(official, decoding=IMAGES)
    content, ours = reply.choices[0].message.content, parts(server, IMAGES)
    flat = [part for piece in ours for part in (piece["hits"] if piece["type"] == "images" else [piece])]
    assert [part["type"] for part in content] == ["text" if "text" in part else "image_url" for part in flat]
    (shown,) = (part for part in content if part["type"] == "image_url")
    assert shown["hit"]["caption"] == next(part["caption"] for part in flat if "caption" in part)
    assert httpx.get(shown["image_url"]["url"]).headers["content-type"] == "image/jpeg"
    assert str(folder) not in reply.to_json()
    seen, work = [], app_on_port.state.handler.worker.chat
    app_on_port.state.handler.worker.chat = lambda asked: seen.extend(asked) or work(asked)
    try:
        bare = [{k: v for k, v in part.items() if k != "hit"} for part in content]  # as a client rebuilds it
        for back in (content, bare):
            again = [*STAR, {"role": "assistant", "content": back}, {"role": "user", "content": "and now"}]
            assert ask(official, again).choices[0].message.content
        again[1] = reply.choices[0].message  # the object itself, as the client's documentation has it
        assert ask(official, again).choices[0].message.content
    finally:
        del app_on_port.state.handler.worker.chat
    kinds = [[type(part).__name__ for part in asked.messages[2]] for asked in seen]
    assert kinds[0] == kinds[1] == kinds[2] and kinds[0].count("Tensor") == 1
    sent = ask(official, decoding=IMAGES, extra={"images": True}).choices[0].message.content
    assert [part["image_url"]["url"][:23] for part in sent if part["type"] == "image_url"] == ["data:image/jpeg;base64,"]


def test_images_are_read_and_messages_of_one_side_are_one(official, app_on_port, folder):
    seen, work = [], app_on_port.state.handler.worker.chat
    app_on_port.state.handler.worker.chat = lambda asked: seen.extend(asked) or work(asked)
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [{"type": "text", "text": "like"}, image_part(data_url(folder / "red.png"))]},
        {"role": "user", "content": "what is it?"},
    ]
    try:
        ask(official, messages)
    finally:
        del app_on_port.state.handler.worker.chat
    system, said = seen[0].messages
    assert "".join(system) == "be kind\nbe brief" and said[0] == "like" and said[2:] == ["\n", "what is it?"]
    assert said[1].shape[0] == 3


def test_a_stream_is_the_answer_in_chunks(official, server):
    for decoding in (WORDS, IMAGES):
        whole = ask(official, decoding=decoding)
        chunks = list(ask(official, decoding=decoding, stream=True, stream_options={"include_usage": True}))
        deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
        text = "".join(delta.content or "" for delta in deltas)
        images = [part["hit"]["id"] for delta in deltas for part in getattr(delta, "images", None) or []]
        content = whole.choices[0].message.content
        listed = [{"type": "text", "text": content}] if isinstance(content, str) else content
        assert text == "".join(part.get("text", "") for part in listed) and len(deltas) > 3
        assert images == [part["hit"]["id"] for part in listed if "hit" in part]
        assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage and len({chunk.id for chunk in chunks}) == 1
        assert deltas[0].role == "assistant" and chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert images and all(chunk.choices for chunk in ask(official, stream=True))
    raw = httpx.post(f"{server}/v1/chat/completions", json={"model": NAME, "messages": STAR, "stream": True})
    assert (raw.headers["cache-control"], raw.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert raw.headers["content-type"].startswith("text/event-stream") and raw.text.endswith("\n\ndata: [DONE]\n\n")


def test_a_stream_that_fails_says_so(official, app_on_port, monkeypatch):
    def broken(asked):
        asked[0][1]("a red")
        raise MemoryError

    monkeypatch.setattr(app_on_port.state.handler.worker, "stream", broken)
    with pytest.raises(openai.APIError, match="not enough memory"):
        list(ask(official, stream=True))


def test_embeddings_are_those_of_ours(official, server, model, folder):
    from PIL import Image

    red = Image.open(folder / "red.png")
    texts = official.embeddings.create(model=NAME, input=["a red star", "x"])  # in base64, as the client asks for
    want = embed_queries(model, ["a red star", "x"]).numpy()
    assert np.allclose([one.embedding for one in texts.data], want, atol=1e-6) and [o.index for o in texts.data] == [0, 1]
    assert texts.usage.prompt_tokens == sum(prompt_length(model, text, Starts.ONCE) for text in ("a red star", "x"))
    assert np.allclose(official.embeddings.create(model=NAME, input="x").data[0].embedding, want[1], atol=1e-6)
    url = data_url(folder / "red.png")
    mixed = ["x", {"image": url}, {"image": url.partition(",")[2], "text": "like it"},
             [{"type": "text", "text": "like"}, image_part(url), {"type": "text", "text": "but blue"}]]  # fmt: skip
    rows = official.embeddings.create(model=NAME, input=mixed, encoding_format="float").data
    ours = embed_queries(model, ["x", red, [red, "like it"], ["like", red, "but blue"]]).numpy()
    assert np.allclose([row.embedding for row in rows], ours, atol=1e-5)
    said = [{"role": "user", "content": mixed[3]}]
    body = httpx.post(f"{server}/v1/embeddings", json={"model": NAME, "messages": said}).json()
    assert np.allclose(body["data"][0]["embedding"], ours[3], atol=1e-5)


ODD = [
    ({"input": [1, 2, 3]}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a"] * 129}, "input"),
    ({"input": ["x" * 30_000] * 5}, "131072 characters in all, not 150000; send less at a time"),
    ({"input": [{"image": PIXEL}] * 33}, "32 images in all, not 33"),
    ({"input": [{"image": f"https://images.example/{i}.png"} for i in range(5)]}, "4 addresses in all, not 5; send less"),
    (
        {
            "input": [
                [image_part("https://images.example/a.png")] * 3,
                {"image": "http://b.example/b"},
                [image_part("http://c/c")],
            ]
        },
        "4 addresses in all, not 5",
    ),
    ({"input": ""}, "nothing in it"),
    ({"input": ["a", " "]}, "input 1"),
    ({"input": "star " * 3000}, "shorten"),
    ({"input": "a", "dimensions": 7}, "leave dimensions out"),
    ({"input": [{}]}, "a text, an image, or both"),
    ({"input": [{"image": "data:text/html,hello"}]}, "base64"),
    ({"input": [{"image": "file:///etc/passwd"}]}, "base64"),
    ({"input": [{"image": "http://127.0.0.1/a.png"}]}, "127.0.0.1"),
    ({"input": [{"image": "http://images.example/" + "a" * 3000}]}, "2048"),
    ({"input": [{"image": "http://["}]}, "http"),
    ({"input": [[image_part("http://169.254.169.254/latest")]]}, "169.254"),
    ({"input": [[image_part("file:///etc/passwd")]]}, "http"),
    ({"input": [[image_part("data:image/png;base64,AAAA")]]}, "image"),
    ({"input": "a", "messages": STAR}, "either"),
    ({}, "either"),
    ({"input": "a", "index": "/etc"}, "unknown field"),
]


@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_inputs_are_refused_in_openais_form(client, number):
    body, told = ODD[number]
    reply = client.post("/v1/embeddings", json={"model": NAME} | body)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error" and told in error["message"], error
    assert set(error) == {"message", "type", "param", "code"} and len(reply.text) < 1000 and "root:" not in reply.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"stop": 1}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 40_000}]}, "messages"),
        ({"decoding": {"use_cache": False}}, "decoding"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, body, param):
    error = client.post("/v1/chat/completions", json={"model": NAME, "messages": STAR} | body).json()["error"]
    assert error["param"].split(".")[0] == param and "-" not in error["param"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": STAR, "metadata": dict.fromkeys(map(str, range(200_000)), 1)}),
        ("chat/completions", {"messages": STAR} | dict.fromkeys(map(str, range(200_000)), 1)),
        ("chat/completions", {"messages": [1] * 400_000}),
        ("chat/completions", {"messages": [{"role": "user", "content": [1] * 400_000}]}),
        ("embeddings", {"input": [1] * 400_000}),
        ("embeddings", {"input": [[1] * 400_000]}),
    ],
)
def test_any_number_of_faults_is_one(client, path, body):
    content = json.dumps({"model": NAME} | body)
    begun = time.process_time()
    reply = client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and len(reply.text) < 1000 and time.process_time() - begun < 1.5


def test_what_asks_for_nothing_is_accepted(official):
    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "response_format": {"type": "text"}, "user": "me"}
    assert ask(official, **neutral, tools=[], store=False, logprobs=False, seed=1, top_p=1).choices[0].message.content


NULL = dict.fromkeys(["top_logprobs", "functions", "reasoning_effort", "prediction", "verbosity", "audio"])


@pytest.mark.parametrize(
    ("field", "decoding"),
    [
        (NULL | {"logit_bias": {}, "functions": [], "web_search_options": None}, {}),
        ({"function_call": "none", "service_tier": "auto", "safety_identifier": "me", "prompt_cache_key": "a"}, {}),
        ({"top_p": 0}, {"top_p": 1e-6}),
        ({"seed": -1}, {"seed": 2**32 - 1}),
        ({"seed": 2**40 + 5}, {"seed": 5}),
        ({"temperature": 1e-7}, {"temperature": 0}),
        ({"temperature": 0.5, "top_p": 0.5, "seed": 7}, {"temperature": 0.5, "top_p": 0.5, "seed": 7}),
    ],
)
def test_what_openais_protocol_allows_is_taken_as_ours(field, decoding):
    body = {"model": NAME, "messages": [STAR[0] | {"reasoning_content": None}]} | field
    asked = as_chat(ChatCompletionRequest.model_validate(body), "http://a/images/", 64)
    assert asked.decoding.model_dump(exclude_unset=True) == decoding
    assert EmbeddingRequest.model_validate({"model": NAME, "input": "a", "extra": None}).input == "a"


def test_messages_that_are_no_conversation_are_refused(client):
    for roles in (["assistant"], ["user", "assistant"], ["system"], ["user", "system", "user"]):
        messages = [{"role": role, "content": "a"} for role in roles]
        reply = client.post("/v1/chat/completions", json={"model": NAME, "messages": messages})
        assert reply.status_code == 400 and "user" in reply.json()["error"]["message"], roles


def test_other_refusals_have_openais_form_too(client, model, index):
    for reply in (client.get("/v1/nothing"), client.post("/v1/models"), client.post("/v1/embeddings", content=b"{"),
                  client.post("/v1/embeddings", content=b" " * (33 << 20))):  # fmt: skip
        assert reply.status_code in (400, 404, 405, 413) and reply.json()["error"]["message"]
    assert client.get("/nothing").json() == {"detail": "Not Found"}
    with TestClient(create_app(model, index, Preset(style="plain"), Capacity(batch_size=1, queue=1))) as full:
        full.app.state.handler.batcher.close()
        refused = full.post("/v1/chat/completions", json={"model": NAME, "messages": STAR})
        assert refused.status_code == 503 and refused.json()["error"]["type"] == "server_error"
        assert refused.headers["retry-after"] == "1"


def test_addresses_are_fetched_under_the_guard(official, monkeypatch, folder):
    from PIL import Image

    asked = []
    red = Image.open(folder / "red.png")
    fetched = "fromage.serving.request_handler.fetch_image"
    monkeypatch.setattr(fetched, lambda url, max_age: asked.append(url) or red)
    message = {"role": "user", "content": [image_part("https://images.example/a.png"), {"type": "text", "text": "what?"}]}
    assert ask(official, [message]).choices[0].message.content and asked == ["https://images.example/a.png"]
    assert fetch.fetch_image is not None
    inputs = [{"image": f"https://images.example/{i}.png"} for i in range(5)]
    assert len(official.embeddings.create(model=NAME, input=inputs[:4]).data) == 4 and len(asked) == 5
    with pytest.raises(openai.BadRequestError, match="4 addresses in all, not 5"):
        official.embeddings.create(model=NAME, input=inputs)
    assert len(asked) == 5, "nothing is fetched for a request that is refused"


def test_json_of_our_own_route_is_as_before(client):
    assert set(client.post("/chat", json=SAY).json()["message"]) == {"role", "content"}
    assert json.loads(client.post("/chat", json={}).text)["detail"][0]["loc"] == ["body", "messages"]
