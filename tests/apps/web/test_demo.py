"""The web demo over HTTP, as a stranger may use it, and in a browser, as a visitor does."""

import asyncio
import importlib
import json
import os
import shutil
import socket
import struct
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
from PIL import Image

pytest.importorskip("gradio")

from fromage.apps.web import guard
from fromage.apps.web import sessions as web_visits
from fromage.apps.web.demo import launch, running
from fromage.apps.web.sessions import SIDE, Sessions, contents, conversation, read
from fromage.errors import UserError
from fromage.generation.chat import Chat
from fromage.generation.preset import Preset, read_preset
from fromage.generation.retrieved import RetrievedImages
from fromage.octopus.model import Octopus
from fromage.retrieval.build import describe
from fromage.retrieval.results import Hit
from fromage.retrieval.table_file import Table

EVIL = "<img src=x onerror='window.hacked=1'><b>bold</b> **stars** $$x^2$$"
SETTINGS = [20, 0, 1, 6]  # bias of [RET], temperature, images, length


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def folder(folder):
    (folder / "words.png").write_text("no image")
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "large.png").write_bytes(bomb(5_010))
    return folder


@pytest.fixture(scope="module")
def caption():
    return EVIL


@pytest.fixture(scope="module")
def octopus():
    return Octopus.load(num_queries=4, decoder_width=16, decoder_layers=1, heads=2)


@pytest.fixture(scope="module")
def address(model, index, octopus):
    with running(model, index, Preset(style="plain"), "127.0.0.1", free_port(), octopus) as address:
        yield address


def bomb(side=40_000):
    """A PNG of so many pixels a side, in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 5001)) + chunk(b"IEND", b"")


class Visitor:
    """A program that talks to the page's server, knowing only what the page knows."""

    def __init__(self, address, name):
        self.http, self.name = httpx.Client(base_url=address, timeout=60), name
        self.events = {each["api_name"]: each["id"] for each in self.http.get("/config").json()["dependencies"]}

    def upload(self, path):
        (path,) = self.http.post("/gradio_api/upload", files={"files": (path.name, path.read_bytes())}).json()
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def send(self, event, data):
        asked = {"data": data, "fn_index": self.events[event], "session_hash": self.name}
        return self.http.post("/gradio_api/queue/join", json=asked).raise_for_status().json()["event_id"]

    def messages(self):
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.name}) as lines:
            for line in lines.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    def call(self, event, *data):
        """All messages of one call."""
        self.send(event, data)
        return list(self.messages())

    def ask(self, text="", files=(), settings=SETTINGS):
        return self.call("answer", {"text": text, "files": list(files)}, None, *settings)


def succeeded(messages):
    (end,) = [message for message in messages if message["msg"] == "process_completed"]
    return end["success"]


def images_in(messages):
    """Paths of all files that are mentioned."""
    found = []

    def walk(part):
        if isinstance(part, dict):
            found.extend([part["path"]] if isinstance(part.get("path"), str) else [])
            part = list(part.values())
        for inner in part if isinstance(part, list) else ():
            walk(inner)

    walk(messages)
    return found


def test_an_image_comes_back_over_http_and_nothing_tells_where_it_lay(address, folder):
    visitor = Visitor(address, "one")
    messages = visitor.ask("a red star", [visitor.upload(folder / "red.png")])
    assert succeeded(messages) and str(folder) not in json.dumps(messages)
    files = {path for path in images_in(messages) if path.endswith(".jpg")}
    assert len(files) == 2, "the one that was sent and the one that came back"
    for path in files:
        assert visitor.http.get(f"/gradio_api/file={path}").content.startswith(b"\xff\xd8")


def test_no_file_of_the_machine_is_served(address, folder):
    http = httpx.Client(base_url=address)
    inside = os.environ["GRADIO_TEMP_DIR"]
    for path in ("/etc/passwd", folder / "red.png", f"{inside}/../../etc/passwd", "setup.cfg", Path("README.md").absolute()):
        assert http.get(f"/gradio_api/file={path}").status_code in (403, 404)
    for fetched in (f"file={address}/config", "file=http://example.org/", "proxy=https://example.org/"):
        assert http.get(f"/gradio_api/{fetched}").status_code in (403, 404)


def test_paths_and_addresses_that_were_never_uploaded_are_refused(address, folder, monkeypatch):
    visitor, fetched = Visitor(address, "crafted"), []
    monkeypatch.setattr("safehttpx.get", lambda *args, **options: fetched.append(args))
    for path in ("/etc/passwd", str(folder / "red.png"), "http://example.org/cat.png"):
        for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):
            messages = visitor.ask("hello", [{"path": path, **meta}])
            assert not succeeded(messages) and not images_in(messages)
            assert not succeeded(visitor.call("search", {"text": "", "files": [{"path": path, **meta}]}, 3))
    assert not fetched and succeeded(visitor.ask('"path": "http://example.org/cat.png"'))


def test_settings_beyond_the_sliders_are_refused(address):
    for settings in ([20, 0, 10**6, 6], [20, 0, 1, 10**9], [20, -1, 1, 6], ["nan", 0, 1, 6]):
        assert not succeeded(Visitor(address, "greedy").ask("a star", settings=settings))


def test_values_that_the_page_cannot_send_are_no_failure_of_the_server(address, capfd):
    for text, settings in ((None, SETTINGS), ("a", ["x", 0, 1, 6]), ("a", [20, None, 1, 6]), ("\ud800", SETTINGS)):
        visitor = Visitor(address, f"malformed {settings}")
        content = json.dumps({"data": [{"text": text, "files": []}, None, *settings], "fn_index": visitor.events["answer"],
                              "session_hash": visitor.name})  # fmt: skip
        headers = {"content-type": "application/json"}
        if visitor.http.post("/gradio_api/queue/join", content=content, headers=headers).is_success:
            assert "Traceback" not in json.dumps(list(visitor.messages()))
    assert "Traceback" not in capfd.readouterr().err


def test_words_are_never_taken_for_a_path_or_an_address(model, folder):
    for words in (str(folder / "red.png"), f"file://{folder}/red.png", "http://localhost/red.png"):
        assert read({"text": words, "files": []}) == [words]


@pytest.mark.parametrize("name", ["words.png", "bomb.png", "large.png"])
def test_what_is_no_image_gets_a_message_and_the_conversation_goes_on(address, folder, name):
    visitor = Visitor(address, f"broken {name}")
    messages = visitor.ask("", [visitor.upload(folder / name)])
    (warning,) = [message for message in messages if message["msg"] == "log"]
    assert warning["level"] == "warning" and name in warning["log"] and "Traceback" not in json.dumps(messages)
    assert succeeded(messages) and succeeded(visitor.ask("a star"))


def test_large_uploads_are_refused(address, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(21 << 20))
    answer = httpx.post(f"{address}/gradio_api/upload", files={"files": (tmp_path / "large.png").open("rb")})
    assert answer.status_code == 413


def test_uploads_are_limited_in_number_and_total_and_older_ones_are_asked_for_again(address, folder, monkeypatch):
    monkeypatch.setattr("fromage.apps.web.shelf.EACH", 60_000)
    visitor, url = Visitor(address, "fills the disk"), f"{address}/gradio_api/upload"
    first = visitor.upload(folder / "red.png")
    for number in range(30):
        reply = httpx.post(url, files={"files": (f"{number}.png", bytes([number]) * 20_000)})
        assert reply.status_code == 200
    kept = [path for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*.png") if path.stat().st_size == 20_000]
    assert len(kept) <= 3, "of 30"
    (end,) = [message for message in visitor.ask("", [first]) if message["msg"] == "process_completed"]
    assert not end["success"] and "add it again" in json.dumps(end)
    assert succeeded(visitor.ask("", [visitor.upload(folder / "red.png")]))
    whole = httpx.post(url, content=b"x" * (65 << 20), headers={"content-type": "multipart/form-data; boundary=x"})
    assert whole.status_code == 413 and "smaller images" in whole.text
    endless = httpx.post(url, content=iter([b"x"]), headers={"content-type": "multipart/form-data; boundary=x"})
    assert endless.status_code == 411


def test_few_uploads_run_at_a_time(address, folder, monkeypatch):
    host, port = address.removeprefix("http://").split(":")
    held = []
    for _ in range(4):
        held.append(socket.create_connection((host, int(port))))
        held[-1].sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
                         b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x")  # fmt: skip
    time.sleep(0.5)
    reply = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", b"x")})
    assert reply.status_code == 429 and "in a moment" in reply.text
    for connection in held:
        connection.close()
    time.sleep(0.5)
    assert httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", b"x")}).status_code == 200


def test_only_what_the_page_asks_for_is_there(address):
    http = httpx.Client(base_url=address)
    for path in ("info", "app_id", "openapi.json", "vibe-code", "stream/a/b/c/playlist.m3u8", "proxy=http://a/"):
        assert http.get(f"/gradio_api/{path}").status_code == 404, path
    for path in ("/docs", "/monitoring", "/login_check"):
        assert http.get(path).status_code == 404, path
    for path in ("/login", "/gradio_api/run/answer", "/gradio_api/api/answer", "/gradio_api/call/answer",
                 "/gradio_api/component_server", "/gradio_api/process_recording", "/gradio_api/vibe-edit"):  # fmt: skip
        assert http.post(path, json={"data": []}).status_code == 404, path
    events = Visitor(address, "no queue").events
    for name, data in (
        ("answer", [{"text": "a", "files": []}, None, *SETTINGS]),
        ("search", [{"text": "a", "files": []}, 3]),
    ):
        sent = {"data": data, "fn_index": events[name], "session_hash": "no queue"}
        assert http.post("/gradio_api/run/predict", json=sent).status_code == 404, "the model is used in turns"
    large = http.post("/gradio_api/queue/join", content=b'{"data": ["' + b"x" * (2 << 20) + b'"]}')
    assert large.status_code == 413
    deep = http.post("/gradio_api/queue/join", content=b"[" * 100_000, headers={"content-type": "application/json"})
    assert deep.status_code in (400, 422)


def test_a_connection_without_a_request_is_cut_off(model, monkeypatch):
    monkeypatch.setattr("fromage.apps.web.demo.SECONDS", 0.3)
    with running(model, None, Preset(style="plain"), "127.0.0.1", port := free_port()):
        half = socket.create_connection(("127.0.0.1", port))
        half.sendall(b"GET / HTTP/1.1\r\nX: ")
        half.settimeout(5)
        assert half.recv(100) == b""


def test_visitors_do_not_see_each_others_conversations(address):
    one, other = Visitor(address, "first"), Visitor(address, "second")
    one.ask("a secret ring")
    assert "secret" not in json.dumps(other.ask("a star"))
    assert "secret" in json.dumps(one.ask("and another"))
    assert "secret" in json.dumps(one.call("undo", None)) and "secret" not in json.dumps(one.call("undo", None))


@pytest.mark.parametrize("cancels", [True, False])
def test_a_visitor_who_leaves_frees_the_model(address, monkeypatch, cancels):
    left = []

    def endless(self, *parts):
        try:
            while True:
                time.sleep(0.02)
                yield "word "
        finally:
            left.append(True)

    monkeypatch.setattr(Chat, "stream", endless)
    visitor = Visitor(address, f"leaves {cancels}")
    event = visitor.send("answer", [{"text": "a star", "files": []}, None, *SETTINGS])
    generating = (message for message in visitor.messages() if message["msg"] == "process_generating")
    assert "word" in json.dumps([next(generating) for _ in range(3)])
    if cancels:
        asked = {"session_hash": visitor.name, "fn_index": visitor.events["answer"], "event_id": event}
        visitor.http.post("/gradio_api/cancel", json=asked).raise_for_status()
    generating.close()
    visitor.http.close()
    monkeypatch.undo()
    assert succeeded(Visitor(address, f"comes {cancels}").ask("a star")) and left


def test_search_by_words_by_image_and_by_both(address, folder):
    visitor = Visitor(address, "searches")
    red = visitor.upload(folder / "red.png")
    for text, files, form in (
        ("a star", [], "</s> a star [RET]"),
        ("", [red], "(image), compared as the index has it"),
        ("another", [red], "(image) </s> another [RET]"),
    ):
        messages = visitor.call("search", {"text": text, "files": files}, 3)
        assert succeeded(messages) and len(set(images_in(messages))) == 3
        (end,) = [message for message in messages if message["msg"] == "process_completed"]
        assert end["output"]["data"][1] == form
    best = images_in(visitor.call("search", {"text": "", "files": [red]}, 1))[0]
    assert Image.open(best).getpixel((9, 9))[0] > 250, "itself"


def test_a_search_is_filtered_where_the_index_has_metadata(model, index, folder, tmp_path):
    index.save(tmp_path / "index")
    paths = [item.path for item in index.items]
    columns = pa.table({"letters": [len(Path(path).stem) for path in paths]})
    described = describe(tmp_path / "index", [Table(pa.array([path.encode() for path in paths]), columns, "t")])
    with running(model, described, Preset(style="plain"), "127.0.0.1", free_port()) as address:
        visitor, sent = Visitor(address, "filters"), {"text": "a star", "files": []}
        for where, count in (("", 6), ("letters <= 4", 2), (" ", 6)):
            messages = visitor.call("search", sent, 6, where)
            assert succeeded(messages) and len(set(images_in(messages))) == count, where
        for where, said in (("letters > 99", "No image fits"), ("letter = 1", "no column letter"), ("1 = 1", "where: ")):
            messages = visitor.call("search", sent, 6, where)
            assert succeeded(messages) and not images_in(messages) and "Traceback" not in json.dumps(messages)
            assert [said in message["log"] for message in messages if message["msg"] == "log"] == [True]
        for where in (None, 3, ["a"], {"a": 1}, "x" * 5000):
            assert "Traceback" not in json.dumps(visitor.call("search", sent, 6, where))


def test_an_image_comes_back_with_boxes_drawn(address, folder):
    visitor = Visitor(address, "points")
    red = visitor.upload(folder / "red.png")
    messages = visitor.call("point", {"text": "the star", "files": [red]})
    assert succeeded(messages) and str(folder) not in json.dumps(messages)
    (path,) = {path for path in images_in(messages) if path.endswith(".jpg")}
    assert len(Image.open(path).getcolors(1 << 20)) > 10, "lines and scores on what was one colour"
    words = visitor.upload(folder / "words.png")
    for text, files in (("the star", []), ("", [red]), ("the star", [words]), ("star " * 999, [red])):
        messages = visitor.call("point", {"text": text, "files": files})
        assert succeeded(messages) and not images_in([message for message in messages if message["msg"] != "log"])
        assert [message["level"] for message in messages if message["msg"] == "log"] == ["warning"]
        assert "Traceback" not in json.dumps(messages)


def talk(model, index, folder, count):
    """So many turns with an image each way; conversation and turns at the end."""
    sessions, turns = Sessions(model, index, Preset(style="plain")), []
    for _ in range(count):
        sent = {"text": "a star", "files": [str(folder / "red.png")]}
        *_, (_, shown, turns) = sessions.answer(sent, turns, *SETTINGS)
    return shown, turns


def test_a_conversation_keeps_files_for_the_page_and_features_for_the_model(model, index, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    drawn, draw = [], web_visits.jpeg
    monkeypatch.setattr(web_visits, "jpeg", lambda *args: drawn.append(args) or draw(*args))
    shown, turns = talk(model, index, folder, 3)
    assert len(images_in(shown)) == len(drawn) == 6, "each is drawn once"
    assert not [each for turn in turns for side in turn.exchange for each in side if isinstance(each, Image.Image)]
    assert conversation(turns) == shown
    for path in set(images_in(turns[0].page)):
        Path(path).unlink()
    assert "kept no longer" in json.dumps(conversation(turns))


def test_of_a_long_conversation_the_end_is_kept(model, index, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(web_visits, "MAX_TURNS", 2)
    shown, turns = talk(model, index, folder, 3)
    assert len(turns) == 2 and len(shown) == 4


def test_a_conversation_takes_so_much_memory(model, index, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    _, turns = talk(model, index, folder, 1)
    monkeypatch.setattr(web_visits, "MAX_KEPT", 2 * turns[0].size() + 100)
    assert turns[0].size() > 2 * 4 * model.vision.width, "features of two images"
    shown, turns = talk(model, index, folder, 4)
    assert len(turns) == 2 and len(shown) == 4


def test_an_answer_that_is_broken_off_leaves_no_turn_and_no_lock(model, index):
    sessions, turns = Sessions(model, index, Preset(style="plain")), []
    answer = sessions.answer({"text": "a star", "files": []}, turns, -20, 0, 1, 30)
    for _ in range(3):
        next(answer)
    assert sessions.lock.locked()
    answer.close()
    assert not sessions.lock.locked() and not turns


def test_without_an_index_there_is_text(model):
    sessions, turns = Sessions(model, None, Preset(style="dialogue")), []
    *_, (_, shown, turns) = sessions.answer({"text": "a star", "files": []}, turns, 20, 0, 1, 4)
    assert "[an image; there is no index to find one in]" in shown[1]["content"] and len(turns) == 1
    with running(model, None, Preset(style="dialogue"), "127.0.0.1", free_port()) as address:
        page = httpx.get(f"{address}/config").text
        assert "There is no index" in page and "text alone" in page and '"gallery"' not in page and '"Point"' not in page


def test_the_page_is_closed_to_elsewhere_and_leaves_nothing(model, index, monkeypatch):
    before, port, called, connect = dict(os.environ), free_port(), [], socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: (called.append(to), connect(self, to))[1])
    with running(model, index, Preset(style="plain"), "127.0.0.1", port) as address:
        page = httpx.get(address)
        assert "default-src 'self'" in page.headers["content-security-policy"]
        config = httpx.get(f"{address}/config").json()
        assert not config["analytics_enabled"] and not config["run_history"]
        assert "google" not in httpx.get(f"{address}/theme.css").text
        inside = Path(os.environ["GRADIO_TEMP_DIR"])
        for bad in (port, 99_999):
            how = model, index, Preset(style="plain"), "127.0.0.1", bad
            with pytest.raises(UserError, match=f"{bad}.*--port"), running(*how):
                pass
    assert {to[0] for to in called if isinstance(to, tuple)} == {"127.0.0.1"}
    assert not inside.exists() and dict(os.environ) == before


def test_the_demo_ends_with_ctrl_c(model, monkeypatch, capsys):
    class Interrupted:
        def wait(self):
            raise KeyboardInterrupt

    monkeypatch.setattr("fromage.apps.web.demo.Event", Interrupted)
    launch(model, None, Preset(style="plain"), "127.0.0.1", port := free_port())
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().out
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}")


def test_without_gradio_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "fromage.apps.web.demo")
    with pytest.raises(UserError, match=r"pip install '\.\[demo\]'"):
        importlib.import_module("fromage.apps.web.demo")


def test_what_is_shown_is_text_and_small(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    shown = RetrievedImages(
        None, [Hit(1, 0.5, "/secret/place.png", EVIL)], [Image.new("RGB", (3000, 20))], ["left out #1: /secret"]
    )
    image, caption, note = contents(shown)
    assert "<" not in caption and "0.50" in caption and "secret" not in note
    assert Image.open(image["path"]).size[0] == SIDE and Path(image["path"]).parent == tmp_path
    assert contents(RetrievedImages(None, notes=["left out #1: /secret"], why_empty="none is there")) == [
        "[an image; none is there]"
    ]
    assert contents("<b>") == ["&lt;b&gt;"] and contents(" ") == []


@contextmanager
def browser():
    sync_api, chromium = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if not chromium:
        pytest.skip("Chromium is not on this machine")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_a_visit_in_a_browser(address, folder):
    with browser() as opened:
        page, asked = opened.new_page(viewport={"width": 1280, "height": 900}), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        chat_in_browser(page, folder)
        search_in_browser(page, folder)
        point_in_browser(page, folder)
        assert page.evaluate("window.hacked") is None
        elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert asked and not elsewhere


def chat_in_browser(page, folder):
    bias = page.locator("input[type=number]").first
    bias.fill("20")
    bias.press("Tab")
    page.locator("input[type=file]").first.set_input_files(folder / "red.png")
    page.locator(".thumbnail-item").first.wait_for()
    box = page.locator("textarea").first
    box.fill(EVIL)
    box.press("Enter")
    answer = page.locator(".bot.message").first
    answer.locator("img").wait_for()
    page.wait_for_function("document.querySelector('.bot.message img').naturalWidth > 0")
    answer.get_by_text(EVIL).wait_for()
    page.locator(".user.message").get_by_text(EVIL).wait_for()
    assert page.locator(".message b, .message img[src=x]").count() == 0
    assert page.locator(".user.message img").count() == 1
    page.get_by_role("button", name="Undo").click()
    answer.wait_for(state="detached")
    page.locator("input[type=file]").first.set_input_files(folder / "words.png")
    page.locator(".thumbnail-item").first.wait_for()
    box.press("Enter")
    page.get_by_text("words.png: undecodable image").wait_for()


def search_in_browser(page, folder):
    page.get_by_role("tab", name="Search").click()
    box = page.locator("textarea:visible").first
    box.fill("a star")
    box.press("Enter")
    page.locator(".thumbnail-lg img").nth(5).wait_for()
    assert page.get_by_text("<b>bold</b>").count() == 6
    assert page.get_by_label("The query as the model reads it").input_value() == "</s> a star [RET]"


def point_in_browser(page, folder):
    page.get_by_role("tab", name="Point").click()
    page.locator("input[type=file]").last.set_input_files(folder / "red.png")
    page.locator(".thumbnail-item:visible").first.wait_for()
    box = page.locator("textarea:visible").first
    box.fill("the star")
    box.press("Enter")
    page.wait_for_function("[...document.images].some(image => image.checkVisibility() && image.naturalWidth > 600)")


def test_the_page_names_the_model_and_begins_with_its_preset(model, index, folder):
    about = {"style": "plain", "name": EVIL, "about": "It knows six colours.", "examples": ["a red star", EVIL],
             "decoding": {"ret_bias": 30, "images_per_ret": 3, "max_new_tokens": 4, "end_at_image": True}}  # fmt: skip
    with running(model, index, read_preset(about), "127.0.0.1", free_port()) as address, browser() as opened:
        config = httpx.get(f"{address}/config").json()
        sliders = [block["props"]["value"] for block in config["components"] if block["type"] == "slider"]
        assert sliders[:4] == [30, 0, 3, 4]
        page = opened.new_page(viewport={"width": 390, "height": 844})
        page.goto(address)
        page.get_by_text("It knows six colours.").wait_for()
        page.get_by_role("button", name="a red star").click()
        page.wait_for_function("document.querySelector('textarea').value == 'a red star'")
        page.locator("textarea").first.press("Enter")
        images = page.locator(".bot.message img")
        images.nth(2).wait_for()
        page.locator(".bot.message").get_by_text("#3").wait_for()
        boxes = [images.nth(number).bounding_box() for number in range(3)]
        assert boxes[0]["y"] == pytest.approx(boxes[1]["y"], abs=8) and boxes[1]["x"] > boxes[0]["x"] + boxes[0]["width"]
        assert page.evaluate("window.hacked") is None and page.evaluate("document.documentElement.scrollWidth") <= 390
        page.wait_for_function("!document.querySelector('.bot.pending')")
        page.get_by_role("button", name="New").click()
        page.wait_for_function("!document.querySelector('.bot.message')")


def test_a_caption_stands_below_its_image(address):
    with browser() as opened:
        page = opened.new_page(viewport={"width": 390, "height": 844})
        page.goto(address)
        page.get_by_role("tab", name="Search").click()
        page.locator("textarea:visible").first.fill("a star")
        page.locator("textarea:visible").first.press("Enter")
        page.locator(".thumbnail-lg img").nth(5).wait_for()
        image, words = (page.locator(f".thumbnail-lg {what}").first.bounding_box() for what in ("img", ".caption-label"))
        assert words["y"] >= image["y"] + image["height"] - 1 and words["width"] > image["width"] - 4


def test_the_page_fits_a_telephone(address):
    with browser() as opened:
        page = opened.new_page(viewport={"width": 390, "height": 844})
        page.goto(address)
        page.locator("textarea").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("textarea").first.bounding_box()["width"] > 150


def test_replies_that_stay_open_do_not_take_all_connections(monkeypatch):
    monkeypatch.setattr(guard, "STREAMS", {"/gradio_api/heartbeat/": (2, 3)})
    ended, sent = asyncio.Event(), []

    async def app(scope, receive, send):
        await ended.wait()

    async def send(message):
        sent.append(message.get("status"))

    async def visit(one, who):
        await one({"type": "http", "path": "/gradio_api/heartbeat/x", "client": (who, 1), "headers": []}, None, send)

    async def all_of_them():
        one = guard.Guard(app, None)
        waiting = [asyncio.create_task(visit(one, who)) for who in ("a", "a", "a", "b", "b")]
        await asyncio.sleep(0.05)
        assert [task.done() for task in waiting] == [False, False, True, False, True] and sent[0] == 429
        ended.set()
        await asyncio.gather(*waiting)
        assert not one.streams

    asyncio.run(all_of_them())
