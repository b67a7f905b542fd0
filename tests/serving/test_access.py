"""Who may use a server: with a key, and from pages of which origins."""

import hmac
import logging
import threading

import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient

from fromage.cli.main import main, parse
from fromage.errors import UserError
from fromage.generation.preset import Preset
from fromage.serving.access import Access, read_keys
from fromage.serving.app import create_app
from fromage.serving.connections import guarded, open_port
from fromage.serving.key_guard import KeyGuard

KEY, OTHER = "sk-0123456789abcdef-secret", "another-key-of-the-file-77"
PAGE = "https://chat.example"


@pytest.fixture
def guarded_app(model, index):
    return create_app(model, index, Preset(style="plain"), access=Access([KEY, OTHER], [PAGE]))


@pytest.fixture
def closed(guarded_app):
    with TestClient(guarded_app) as client:
        yield client


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [{}, bearer(""), bearer(KEY[:-1]), bearer(KEY + "x"), bearer(KEY.upper()), {"authorization": KEY}, bearer("\xff"),
     {"authorization": f"Basic {KEY}"}, {"x-api-key": KEY}],
)  # fmt: skip
def test_without_a_right_key_nothing_is_said(closed, headers):
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    for method, path in (("POST", "/search"), ("POST", "/v1/embeddings"), ("GET", "/metrics"), ("GET", "/v1/models"),
                         ("GET", "/images/" + "0" * 16), ("GET", "/nothing"), ("OPTIONS", "/chat")):  # fmt: skip
        refused = closed.request(method, path, headers=headers)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer", path
        assert ("error" in refused.json()) == path.startswith("/v1/") and KEY not in refused.text
    assert closed.get(f"/v1/models?api_key={KEY}", headers=headers).status_code == 401, "addresses are logged"
    assert closed.post("/search", headers=[(b"authorization", b"x"), (b"authorization", f"Bearer {KEY}".encode())],
                       json={"query": "a"}).status_code == 401  # fmt: skip


def test_each_key_of_the_file_opens_and_the_health_check_needs_none(closed):
    for key in (KEY, OTHER):
        assert closed.post("/search", json={"query": "a"}, headers=bearer(key)).status_code == 200
    assert closed.get("/healthz").status_code == 200 and closed.get("/docs").status_code == 200
    assert "HTTPBearer" in closed.get("/openapi.json").json()["components"]["securitySchemes"]


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    guard = KeyGuard(None, [KEY, OTHER])
    assert guard._known({"headers": [(b"authorization", f"bearer {KEY}".encode())]})
    assert not guard._known({"headers": [(b"authorization", b"Bearer x")]}) and not guard._known({"headers": []})
    assert len(compared) == 6 and all(len(a) == len(b) == 32 for a, b in compared), "digests, and all of them each time"


def test_the_official_client_sends_its_key_and_no_log_has_it(model, index, caplog, capfd):
    app = create_app(model, index, Preset(style="plain"), access=Access([KEY]))
    listening = open_port("127.0.0.1", 0)
    server = uvicorn.Server(guarded(app, "127.0.0.1", 20, log_level="debug"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    url = "http://127.0.0.1:{1}/v1".format(*listening.getsockname())
    try:
        with caplog.at_level(logging.DEBUG, "uvicorn"), caplog.at_level(logging.DEBUG, "fromage"):
            with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
                assert client.models.list().data and client.embeddings.create(model="fromage", input="a").data
            with (
                openai.OpenAI(base_url=url, api_key="sk-wrong", max_retries=0) as client,
                pytest.raises(openai.AuthenticationError) as refused,
            ):
                client.models.list()
        assert refused.value.code == "invalid_api_key"
    finally:
        server.should_exit = True
        thread.join()
    said = "".join(capfd.readouterr()) + caplog.text
    assert "/v1/models" in said and KEY not in said and "sk-wrong" not in said
    assert KEY not in repr(Access([KEY]))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no key"),
        (b"\n \n", "no key"),
        (b"short\n", "line 1"),
        (b"# a comment of the keys\n", "line 1"),
        (KEY.encode() + b"\ntwo words of a key here\n", "line 2"),
        (b"\xff\xfe" + b"a" * 30, "ASCII"),
        (b"a" * 600, "line 1"),
        (b"abcdefghijklmnop\n" * 5000, "64 KiB"),
    ],
)
def test_files_of_keys_that_hold_none(tmp_path, content, told):
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(UserError, match=told) as refused:
        read_keys(file)
    assert "\n" not in str(refused.value) and not any(word in str(refused.value) for word in (KEY, "two words", "short"))


def test_a_file_of_keys_is_read_before_the_model(tmp_path, capsys):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\r\n\n{OTHER}")
    assert read_keys(file) == [KEY, OTHER]
    file.write_text("short")
    words = ["serve", "--ckpt", "no/such", "--port", "0", "--api-key-file"]
    assert main([*words, str(file)]) == 2 and "16 to 512" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "gone")]) == 2 and "no such file" in capsys.readouterr().err


def test_pages_of_named_origins_may_ask_and_read_and_others_may_not(guarded_app):
    app = guarded(guarded_app, "127.0.0.1", 20, [PAGE]).app
    with TestClient(app, base_url="http://127.0.0.1") as client, TestClient(guarded_app):
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
        preflight = client.options("/v1/chat/completions", headers={"origin": PAGE} | asks)
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        for key, status in ((KEY, 200), ("wrong", 401)):
            reply = client.get("/v1/models", headers=bearer(key) | {"origin": PAGE})
            assert reply.status_code == status and reply.headers["access-control-allow-origin"] == PAGE
        for origin in ("https://evil.example", "https://chat.example.evil.example", "http://chat.example", "null"):
            reply = client.get("/v1/models", headers=bearer(KEY) | {"origin": origin})
            assert reply.status_code == 403 and "access-control-allow-origin" not in reply.headers
            told = reply.json()["error"]
            assert told["type"] == "permission_error" and "name it by --cors" in told["message"]
        rebound = client.get("/v1/models", headers=bearer(KEY) | {"origin": PAGE, "host": "evil.example"})
        assert rebound.status_code == 403 and "--cors" not in rebound.json()["error"]["message"]


@pytest.mark.parametrize(
    "origin", ["*", "null", "chat.example", "https://", "https://a.b/c", "https://a b", "ftp://a.b", ""]
)
def test_what_is_no_origin_is_refused(origin, capsys):
    with pytest.raises(UserError, match="origin"):
        Access(origins=[origin])
    assert main(["serve", "--cors", origin]) == 2 and "Traceback" not in capsys.readouterr().err


def test_origins_on_the_command_line():
    _, values = parse(["serve", "--cors", "https://Chat.example/", "--cors", "http://[::1]:3000"])
    assert values["cors"] == ["https://chat.example", "http://[::1]:3000"]
