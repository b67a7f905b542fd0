"""What the HTTP server answers: as the library does, and to no request with a failure."""

import base64
import io
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import pyarrow as pa
import pytest
import schemathesis
import torch
from fastapi.testclient import TestClient
from PIL import Image
from schemathesis.checks import load_all_checks
from served import SAY, captions, sent

from fromage.data.image_source import Item
from fromage.errors import OutOfReach, UserError
from fromage.generation.chat import Chat
from fromage.generation.options import Decoding
from fromage.generation.preset import Preset
from fromage.retrieval.build import describe
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.table_file import Table
from fromage.serving.app import create_app
from fromage.serving.image_ids import ImageIds
from fromage.serving.routes import status_of

JSON = {"content-type": "application/json"}
IMAGES_PLEASE = {"max_new_tokens": 6, "ret_bias": 1e4}
load_all_checks()


def events(reply):
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
    assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-cache", "no")
    blocks = [block.splitlines() for block in reply.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def nearest(index, rows, k):
    return [hit.caption for hit in index.search(rows.numpy(), k)[0]]


def test_search_by_words_by_an_image_and_by_both(client, model, index, folder):
    image = Image.open(folder / "blue.png")
    both = model.embed_text([["a star like", image, "at night"]])
    assert captions(client.post("/search", json={"query": "a red star", "k": 6})) == nearest(
        index, model.embed_text(["a red star"]), 6
    )
    assert captions(client.post("/search", json={"query": [sent(folder / "blue.png")], "k": 1})) == ["blue"]
    query = [{"type": "text", "text": "a star like"}, sent(folder / "blue.png"), {"type": "text", "text": "at night"}]
    assert captions(client.post("/search", json={"query": query, "k": 6})) == nearest(index, both, 6)


def test_images_come_when_asked_for_and_no_path_ever(client, folder):
    reply = client.post("/search", json={"query": [sent(folder / "red.png")], "k": 3, "images": True})
    best = reply.json()["hits"][0]
    small = Image.open(io.BytesIO(base64.b64decode(best["image"])))
    assert small.format == "JPEG" and small.size == (64, 64) and small.getpixel((9, 9))[0] > 250
    assert str(folder) not in reply.text and str(folder.parent) not in reply.text and best["url"] is None
    assert (best["name"], best["key"], best["metadata"]) == ("red.png", "red", {})
    served = client.get(f"/images/{best['id']}")
    assert served.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(served.content)).size == (64, 64)
    assert client.post("/search", json={"query": "x"}).json()["hits"][0]["image"] is None


def test_names_of_before_version_0_2_are_understood(client, folder):
    best = client.post("/search", json={"query": "x", "pictures": True}).json()["hits"][0]
    assert best["image"] and client.get(f"/pictures/{best['id']}").content == client.get(f"/images/{best['id']}").content
    assert client.post("/search", json={"query": [sent(folder / "red.png") | {"type": "picture"}]}).status_code == 200
    sent_back = {"type": "pictures", "hits": [{"id": best["id"]}]}
    assert client.post("/search", json={"query": [sent_back]}).json()["hits"][0]["id"] == best["id"]


@pytest.mark.parametrize("name", ["0" * 16, "0", "..%2F..%2Fetc%2Fpasswd", "../healthz", "%00", "red.png", "F" * 16])
def test_only_images_of_the_index_are_served(client, name):
    assert client.get(f"/images/{name}").status_code in (404, 422) or name == "../healthz"


def test_a_conversation_is_answered_as_chat_answers_it(client, model, index, folder):
    chat = Chat(model, index, Decoding(**IMAGES_PLEASE), "plain", system=["be kind."])
    messages = [{"role": "system", "content": "be kind."}]
    for said in (["a red star"], ["another one", folder / "blue.png"], ["and one more"]):
        content = [{"type": "text", "text": p} if isinstance(p, str) else sent(p) for p in said]
        messages.append({"role": "user", "content": content})
        reply = client.post("/chat", json={"messages": messages, "decoding": IMAGES_PLEASE})
        message, answer = reply.json()["message"], chat.say(*said)
        want = [p if isinstance(p, str) else [hit.caption for hit in p.hits] for p in answer.parts]
        got = [p["text"] if p["type"] == "text" else [hit["caption"] for hit in p["hits"]] for p in message["content"]]
        assert got == want and any(isinstance(part, list) for part in got)
        messages.append(message)  # as it came
    assert len({hit["id"] for m in messages[2::2] for p in m["content"] if "hits" in p for hit in p["hits"]}) == 3


def test_full_size_images_do_not_pile_up(app, client, monkeypatch):
    opened, alive = [], []

    def opening(*name):
        image = Image.new("RGB", (2000, 10))
        opened.append(weakref.ref(image))
        alive.append(sum(each() is not None for each in opened))
        return image

    monkeypatch.setattr(app.state.handler.ids, "open", opening)
    monkeypatch.setattr("fromage.retrieval.results.open_image", opening)
    monkeypatch.setattr("fromage.retrieval.results.POOL", ThreadPoolExecutor(1))
    monkeypatch.setitem(app.state.handler._threads, "found", ThreadPoolExecutor(1))
    hits = client.post("/search", json={"query": "a", "k": 6, "images": True}).json()["hits"]
    shown = {"type": "images", "hits": [{"id": hit["id"]} for hit in hits]}
    assert captions(client.post("/search", json={"query": [shown]}))
    assert len(alive) == 12 and max(alive) == 1


def test_ids_are_known_before_they_are_first_asked_for(model, folder):
    rows, items = torch.eye(32)[:2].numpy(), [Item(str(folder / name)) for name in ("red.png", "blue.png")]
    index = FaissIndex.build(rows, items, model.fingerprint())
    ids = ImageIds(index)
    index.items = list(index.items)  # which has no slices to go through
    assert [ids.find(ids.of(item.path)) for item in items] == items


def test_ids_alone_may_be_sent_back_and_images_that_have_gone(model, index, tmp_path):
    gone = FaissIndex.build(index.vectors[:1], [Item(str(tmp_path / "gone.png"))], model.fingerprint())
    shown = {"type": "images", "hits": [{"id": ImageIds(gone).of(str(tmp_path / "gone.png"))}]}
    said = {"role": "user", "content": "a"}
    asked = {"messages": [said, {"role": "assistant", "content": [shown]}, said], "decoding": {"max_new_tokens": 2}}
    with TestClient(create_app(model, gone)) as client:
        assert client.post("/chat", json=asked).status_code == 200
        assert client.post("/search", json={"query": "a", "images": True}).json()["hits"] == []
        said["content"] = ""
        assert client.post("/chat", json={"messages": [said]}).status_code == 422
        (fault,) = client.post("/search", json={"query": ""}).json()["detail"]
        assert fault["msg"] == "there is nothing in it; give some words or an image"
        said["content"] = "a"
        refused = client.get(f"/images/{shown['hits'][0]['id']}")
        assert refused.status_code == 404 and str(tmp_path) not in refused.text
        shown["hits"][0]["id"] = "0" * 16
        assert client.post("/chat", json=asked).status_code == 400


def test_the_next_best_takes_the_place_of_what_has_gone(model, index, folder, tmp_path):
    items = [Item(str(tmp_path / f"{i}.png"), "gone") for i in range(9)] + [Item(str(folder / "red.png"), "red")]
    odd = FaissIndex.build(torch.randn(10, 32).numpy(), items, model.fingerprint())
    asked = SAY | {"decoding": IMAGES_PLEASE, "images": True}
    with TestClient(create_app(model, odd, Preset(style="plain"))) as client:
        assert captions(client.post("/search", json={"query": "a", "k": 1, "images": True})) == ["red"]
        message = client.post("/chat", json=asked).json()["message"]
        assert [[hit["caption"] for hit in part["hits"]] for part in message["content"] if "hits" in part] == [["red"]]
        assert events(client.post("/chat", json=asked | {"stream": True}))[-1][1]["message"] == message
        assert len(captions(client.post("/search", json={"query": "a", "k": 5}))) == 5, "not opened"


def test_a_stream_is_the_reply_in_pieces(client):
    asked = SAY | {"decoding": IMAGES_PLEASE | {"min_tokens": 2}, "images": True}
    whole = client.post("/chat", json=asked).json()
    said = events(client.post("/chat", json=asked | {"stream": True}))
    assert [name for name, _ in said[-2:]] == ["text", "done"] and said[-1][1] == whole
    assert "images" in [name for name, _ in said] and len(said) > 4
    text = "".join(data["text"] for name, data in said if name == "text")
    assert text == "".join(part["text"] for part in whole["message"]["content"] if part["type"] == "text")


def test_the_same_seed_gives_the_same(client):
    def ask(seed):
        decoding = {"temperature": 1.5, "seed": seed, "max_images": 0}
        return client.post("/chat", json=SAY | {"decoding": decoding}).text

    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(ask, [1, 2, 1, 2, 1, 2]))
    assert replies[::2] == [replies[0]] * 3 and replies[1::2] == [replies[1]] * 3 != replies[::2]


def test_a_stream_that_fails_says_so(app, client, monkeypatch):
    def broken(asked):
        asked[0][1]("a red")
        raise UserError("the star has set")

    monkeypatch.setattr(app.state.handler.worker, "stream", broken)
    said = events(client.post("/chat", json=SAY | {"stream": True}))
    assert said == [("text", {"text": "a red"}), ("error", {"detail": "the star has set"})]
    too_long = {"messages": [{"role": "user", "content": "star " * 2000}], "stream": True}
    monkeypatch.undo()
    assert client.post("/chat", json=too_long).status_code == 400, "before the first piece it is a status"


def bomb(side=20_000):
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return {"type": "image", "data": base64.b64encode(file.getvalue()).decode()}


NASTY = [
    {"query": [bomb(5_010)]},  # beyond what a stranger may send
    *({"query": [{"type": "image", "data": data}]} for data in ("%%%", "", "\u00e9", "AAAA", "iVBORw0KGgo=", "\n")),
    {"query": [bomb()]},
    *({"query": [{"type": "url", "url": url}]} for url in ("file:///etc/passwd", "http://127.0.0.1/", "http://[", "\x00")),
    {"query": [{"type": "url", "url": "http://169.254.169.254/latest"}]},
    {"query": [{"type": "images", "hits": [{"id": "../../etc/passwd"}]}]},
    {"query": "\ud800"},
    {"query": [{"type": "\udc00"}]},
    {"query": "a", "\ud800": 1},
    {"query": "a", "k": 10**400},
    {"query": "a", "k": float("nan")},
    {"query": "a", "k": True},
    {"query": "a", "index": "/etc"},
    {"query": "star " * 3000},
    {"query": "x" * 40_000},
    {"query": [{"type": "text", "text": "x" * 20_000}] * 2},
    {"query": [{"type": "text", "text": "x"}] * 65},
    {"query": [{"type": "url", "url": "https://a.org/b.jpg"}] * 5},
    {"query": None},
    *({"query": query} for query in ("", " \n", [], [{"type": "text", "text": ""}])),
    [],
    None,
    "a",
]
GOOD = [
    *({"query": query} for query in ("[RET] </s> <|image|>", "/etc/passwd", "\x00")),
    {"query": "\U0001f9c0" * 20, "k": 50},
    {"query": [{"type": "images", "hits": []}]},
]


@pytest.mark.parametrize("body", range(len(NASTY)))
def test_nasty_searches_are_refused(client, body):
    content = json.dumps(NASTY[body])
    reply = client.post("/search", content=content, headers={"content-type": "application/json"})
    assert reply.status_code in (400, 422), reply.text
    assert reply.json()["detail"] and len(reply.text) < 2000 and "root:" not in reply.text


@pytest.mark.parametrize("body", range(len(GOOD)))
def test_odd_searches_are_answered(client, body):
    assert captions(client.post("/search", json=GOOD[body]))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("inf")},
        {"temperature": 1e-300, "top_p": 1e-300},
        {"max_new_tokens": 10**6},
        {"min_tokens": 40},
        {"stop": [""]},
        {"stop": ["\ud800"]},
        {"seed": -1},
        {"seed": 2**32 - 1, "temperature": 10, "repetition_penalty": 0.1},
        {"ret_bias": 1e4, "max_images": 4, "images_per_ret": 8},
        {"ret_bias": "NaN"},
        {"use_cache": False},
    ],
)
def test_odd_decodings(client, options):
    content = json.dumps(SAY | {"decoding": {"max_new_tokens": 8} | options})
    status = client.post("/chat", content=content, headers={"content-type": "application/json"}).status_code
    fine = options.get("temperature") == 10 or "images_per_ret" in options
    assert status == 200 if fine else status in (400, 422)


@pytest.mark.parametrize(
    "roles", [[], ["assistant"], ["user", "user"], ["user", "system"], ["system"], ["user", "assistant"]]
)
def test_messages_take_turns(client, roles):
    messages = [{"role": role, "content": "a"} for role in roles]
    assert client.post("/chat", json={"messages": messages}).status_code == 422


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"query": 1' + b"0" * 5000 + b"}", b"NaN"])
def test_what_is_no_json(client, content):
    assert client.post("/search", content=content, headers={"content-type": "application/json"}).status_code in (400, 422)


def test_large_bodies_are_refused_whether_announced_or_not(client):
    def chunks():
        for _ in range(40):
            yield b" " * (1 << 20)

    assert client.post("/search", content=b" " * (33 << 20)).status_code == 413
    assert client.post("/search", content=chunks()).status_code == 413
    assert client.post("/search", headers={"content-length": "9" * 30}).status_code == 413


def test_without_an_index_there_are_words(model):
    with TestClient(create_app(model, None, Preset(style="plain"))) as client:
        assert client.get("/healthz").json() == {"status": "ok", "images": 0, "waiting": 0}
        assert "--index" in client.post("/search", json={"query": "a"}).json()["detail"]
        reply = client.post("/chat", json=SAY | {"decoding": IMAGES_PLEASE}).json()
        assert {"type": "images", "hits": []} in reply["message"]["content"]
        assert client.get("/images/" + "0" * 16).status_code == 404


def test_names_that_are_not_unicode_and_addresses(model, index):
    items = [Item("/tmp/\udcff.png", "caf\udce9"), Item("https://images.example/b.jpg", "b")]
    odd = FaissIndex.build(index.vectors[:2], items, model.fingerprint())
    with TestClient(create_app(model, odd)) as client:
        hits = client.post("/search", json={"query": "a"}).json()["hits"]
    assert {(hit["caption"], hit["url"]) for hit in hits} == {("caf?", None), ("b", "https://images.example/b.jpg")}


def test_the_schema_tells_limits_and_examples(app):
    schema = app.openapi()
    openai = {"/v1/chat/completions", "/v1/embeddings", "/v1/models", "/v1/models/{name}"}
    assert set(schema["paths"]) == {"/chat", "/search", "/images/{name}", "/healthz", "/metrics"} | openai
    shapes = schema["components"]["schemas"]
    ours, theirs = (shapes[name]["properties"] for name in ("DecodingOptions", "ChatCompletionRequest"))
    assert ours["max_new_tokens"]["maximum"] == 512 and "at most 512, and" in theirs["max_completion_tokens"]["description"]
    for shape, bounds in ((ours["top_p"], (1e-6, 1)), (ours["seed"], (0, 2**32 - 1)), (theirs["top_p"], (0, 1))):
        number = shape.get("anyOf", [shape])[0]
        assert (number["minimum"], number["maximum"]) == bounds
    text, texts, _ = theirs["stop"]["anyOf"]
    assert (texts["maxItems"], ours["stop"]["maxItems"]) == (8, 8)
    assert [each["maxLength"] for each in (text, texts["items"], ours["stop"]["items"])] == [64] * 3
    for name, path in (
        ("SearchRequest", "/search"),
        ("ChatRequest", "/chat"),
        ("ChatCompletionRequest", "/v1/chat/completions"),
        ("EmbeddingRequest", "/v1/embeddings"),
    ):
        example = shapes[name]["examples"][0]
        with TestClient(app) as client:
            assert client.post(path, json=example).status_code == 200
    for path in schema["paths"].values():
        assert all(operation["summary"] and operation["description"] for operation in path.values())


def fuzz(app, method, path, mode):
    """Requests from the schema, or against it, checked for what it promises."""
    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
    checks = schemathesis.checks.CHECKS.get_by_names([*names, "negative_data_rejection"])
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method]

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        case.call_and_validate(checks=checks)

    run()


ROUTES = [("POST", "/chat"), ("POST", "/search"), ("GET", "/images/{name}"), ("POST", "/v1/chat/completions"),
          ("POST", "/v1/embeddings"), ("GET", "/v1/models/{name}")]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_fuzzed_from_its_schema(app, method, path):
    fuzz(app, method, path, schemathesis.GenerationMode.POSITIVE)
    fuzz(app, method, path, schemathesis.GenerationMode.NEGATIVE)


def test_what_a_request_leaves_open_the_models_preset_says(model, index, monkeypatch):
    monkeypatch.setattr(model, "generation", {"style": "plain", "system": "a world", "decoding": {"max_new_tokens": 3,
                        "ret_bias": 20, "images_per_ret": 2}})  # fmt: skip
    app, seen = create_app(model, index), []
    work = app.state.handler.worker.chat
    monkeypatch.setattr(app.state.handler.worker, "chat", lambda asked: seen.extend(asked) or work(asked))
    with TestClient(app) as client:
        for body in (
            SAY,
            SAY | {"decoding": {"ret_bias": 0}},
            {"messages": [{"role": "system", "content": "b"}] + SAY["messages"]},
        ):
            assert client.post("/chat", json=body).status_code == 200
    assert [(one.decoding.ret_bias, one.decoding.max_new_tokens, one.messages[0]) for one in seen] == [
        (20, 3, ["a world"]), (0, 3, ["a world"]), (20, 3, ["b"])]  # fmt: skip


@pytest.fixture(scope="module")
def described(model, index, tmp_path_factory):
    """The application over the same index with metadata."""
    folder = tmp_path_factory.mktemp("described")
    index.save(folder / "index")
    columns = pa.table({"letters": [len(path.stem) for path in map(Path, index_paths(index))], "tags": ["a"] * len(index)})
    known = Table(pa.array([path.encode() for path in index_paths(index)]), columns, "t")
    with TestClient(create_app(model, describe(folder / "index", [known]), Preset(style="plain"))) as client:
        yield client


def index_paths(index):
    return [item.path for item in index.items]


def test_a_search_is_filtered(described, folder):
    search = lambda where, k=6: described.post("/search", json={"query": "a star", "k": k, "where": where})  # noqa: E731
    everything = captions(search(""))
    assert captions(search("letters <= 4")) == [name for name in everything if len(name) <= 4] != everything
    assert search("letters = 3 and tags like 'a%'").json()["hits"][0]["metadata"] == {"letters": 3, "tags": "a"}
    assert captions(search("letters > 99")) == []
    (folder / "red.png").rename(folder / "gone")
    try:  # the next best takes its place, and no image that does not pass
        asked = {"query": [sent(folder / "gone")], "k": 6, "where": "letters in (3, 4)", "images": True}
        hits = described.post("/search", json=asked).json()["hits"]
        assert "red" not in [hit["caption"] for hit in hits] and {len(hit["caption"]) for hit in hits} <= {3, 4}
    finally:
        (folder / "gone").rename(folder / "red.png")


@pytest.mark.parametrize(
    "where", ["letters = 'x'", "letter = 1", "1 = 1", "\0", "(" * 4000, "tags = read_csv('/etc/passwd')"]
)
def test_a_faulty_filter_is_one_line_and_harms_no_other_search(described, where):
    with ThreadPoolExecutor(4) as pool:
        asked = [{"query": "a star", "where": each} for each in (where, "", where, "letters > 0")]
        replies = list(pool.map(lambda body: described.post("/search", content=json.dumps(body), headers=JSON), asked))
    assert [reply.status_code for reply in replies] == [400, 200, 400, 200]
    assert all("\n" not in reply.json()["detail"] for reply in replies[::2])


def test_filters_without_metadata_and_too_long_ones_are_refused(client):
    reply = client.post("/search", json={"query": "x", "where": "year = 1"})
    assert reply.status_code == 400 and "has no metadata" in reply.json()["detail"]
    for bad in ("x" * 4097, 3, None, ["a"]):
        assert client.post("/search", json={"query": "x", "where": bad}).status_code == 422


def test_a_service_that_does_not_answer_is_503_and_its_address_stays_here():
    status, told = status_of(OutOfReach("Milvus at http://10.0.0.5:19530: no answer"))
    assert status == 503 and "10.0.0.5" not in told and status_of(UserError("a faulty filter")) == (400, "a faulty filter")
