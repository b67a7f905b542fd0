"""Images fetched from a server on this machine that does what servers do."""

import gzip
import os
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpcore
import httpx
import pytest
from hostile import endless
from PIL import Image
from test_codec import encoded

from fromage.errors import UserError
from fromage.images.decode_process import DECODERS
from fromage.images.fetch import FRESH, FetchLimits, fetch_image
from fromage.images.guarded_transport import GuardedBackend, GuardedTransport, is_public
from fromage.images.open import open_image

RED = encoded(Image.new("RGB", (8, 6), (255, 0, 0)))
QUICK = FetchLimits(connect=0.5, total=1.0, size=4000, attempts=3, redirects=3)


class Server(BaseHTTPRequestHandler):
    seen: list[str] = []

    def do_GET(self):
        self.seen.append(self.path)
        with suppress(OSError):  # the other side has hung up
            getattr(self, self.path.strip("/").partition("?")[0], self.missing)()

    def log_message(self, *args):
        pass

    def answer(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def missing(self):
        self.answer(404)

    def red(self):
        self.answer(200, RED)

    def text(self):
        self.answer(200, b"<html>not an image</html>")

    def gone(self):
        self.answer(410)

    def silent(self):
        time.sleep(3)

    def slow(self):
        self.answer(200)
        for byte in RED:
            self.wfile.write(bytes([byte]))
            time.sleep(0.1)

    def headers_one_by_one(self):
        for i in range(30):
            self.wfile.write(b"HTTP/1.0 200 OK\r\n" if not i else b"X-%d: x\r\n" % i)
            time.sleep(0.1)

    def endless(self):
        self.answer(200)
        while True:
            self.wfile.write(b"x" * 1000)

    def big(self):
        self.answer(200, **{"Content-Length": "5000000"})
        time.sleep(3)

    def short(self):
        self.answer(200, RED[:40], **{"Content-Length": str(len(RED))})

    def busy(self):
        self.answer(200 if self.seen.count(self.path) > 1 else 503, RED)

    def broken(self):
        self.answer(500)

    def loop(self):
        self.answer(302, Location="/loop")

    def moved(self):
        self.answer(301, Location="red?moved")

    def inside(self):
        self.answer(302, b"x" * 1000, Location="http://10.0.0.1/red")

    def zipped(self):
        self.answer(200, gzip.compress(RED), **{"Content-Encoding": "gzip"})

    def heavy(self):
        self.answer(200, endless())

    def away(self):
        self.answer(302, Location="file:///etc/passwd")


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        httpd.daemon_threads, httpd.block_on_close = True, False
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def fetch(server, tmp_path):
    def call(path, limits=QUICK, **options):
        Server.seen.clear()
        return fetch_image(server + path, limits, **({"cache": tmp_path / "cache", "allow_private": True} | options))

    return call


@pytest.mark.parametrize("path", ["/red", "/red?size=large&x=%20é", "/moved", "/busy"])
def test_an_image(fetch, path):
    image = fetch(path)
    assert (image.mode, image.size, image.getpixel((1, 1))) == ("RGB", (8, 6), (255, 0, 0))


FAILURES = {
    "/none": ("answers 404", 1),
    "/gone": ("answers 410", 1),
    "/text": ("undecodable", 1),
    "/broken": ("answers 500", 3),
    "/short": ("without sending complete message body", 3),
    "/loop": ("more than 3 redirects", 4),
    "/away": ("no http or https", 1),
    "/endless": ("larger than", 1),
    "/big": ("larger than", 1),
}


@pytest.mark.parametrize("path", FAILURES)
def test_what_is_no_image_is_one_line_and_only_what_may_pass_is_asked_for_again(fetch, server, path):
    cause, asked = FAILURES[path]
    with pytest.raises(UserError, match=cause) as failure:
        fetch(path, FetchLimits(connect=0.5, total=5, size=4000, redirects=3))
    assert str(failure.value).startswith(server + path) and "\n" not in str(failure.value)
    assert len(Server.seen) == asked


def test_what_decodes_without_end_is_given_up(fetch, monkeypatch):
    monkeypatch.setattr(DECODERS, "seconds", 0.5)
    with pytest.raises(UserError, match="longer than"):
        fetch("/heavy", FetchLimits(total=20))


@pytest.mark.parametrize("path", ["/silent", "/slow", "/headers_one_by_one"])
def test_time_is_limited_whatever_the_server_does(fetch, path):
    began = time.monotonic()
    with pytest.raises(UserError, match="no answer within 1 s"):
        fetch(path)
    assert time.monotonic() - began < 2.5  # of the three seconds it would take at least


def test_a_resolver_that_does_not_answer_is_left_behind(fetch, monkeypatch):
    resolve, go, over = socket.getaddrinfo, threading.Event(), threading.Event()

    def slow(*args, **options):
        go.wait(60)
        over.set()
        return resolve(*args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with pytest.raises(UserError, match="no answer within"):
        fetch("/red", FetchLimits(total=0.3))
    assert not over.is_set()
    go.set()
    assert over.wait(60)


def answers(*addresses):
    """A stand-in for getaddrinfo: these addresses, whatever the host; an address is itself."""

    def resolve(host, port, *_, **__):
        found = [host] if host[0].isdecimal() else addresses
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found]

    return resolve


def test_all_addresses_of_a_host_share_the_time_there_is(monkeypatch):
    tried = []

    class Deaf:
        def connect_tcp(self, address, port, timeout, *_):
            tried.append(timeout)
            raise httpcore.ConnectTimeout("timed out")

    monkeypatch.setattr(socket, "getaddrinfo", answers(*(f"8.8.8.{i}" for i in range(20))))
    backend = GuardedBackend(time.monotonic() + 1, connect=3.0)
    backend.inner = Deaf()
    with pytest.raises(httpcore.ConnectTimeout):
        backend.connect_tcp("many.example", 80)
    assert len(tried) == 4 and max(tried) <= 1


def test_an_image_of_too_many_pixels_is_refused(fetch):
    with pytest.raises(UserError, match="8 x 6 pixels are too large"):
        fetch("/red", FetchLimits(pixels=47))


def test_nobody_is_there(fetch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(UserError, match=r"refused|no answer"):
        fetch_image(f"http://127.0.0.1:{port}/a.jpg", QUICK, allow_private=True)
    with pytest.raises(UserError, match="host is unknown"):
        fetch_image(f"http://{'a' * 70}.example/a.jpg", QUICK)


STRANGE = [
    "file:///etc/passwd",
    "ftp://h/a",
    "a.jpg",
    "",
    "http://",
    "http:///a",
    "http://[::1",
    "http://h:99999/",
    "http://a\nb/",
]


@pytest.mark.parametrize("url", STRANGE)
def test_other_addresses_are_refused(url):
    with pytest.raises(UserError, match="no http or https address"):
        fetch_image(url, QUICK)


# --- private addresses --------------------------------------------------------------------------------------------------


PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "0.0.0.0",
    "100.64.0.1",
    "224.0.0.1",
    "::1",
]
PRIVATE += [
    "::",
    "fe80::1%eth0",
    "fd00::1",
    "::ffff:127.0.0.1",
    "::ffff:a9fe:a9fe",
    "::7f00:1",
    "::10.0.0.1",
    "2002:7f00:1::",
    "64:ff9b::7f00:1",
    "64:ff9b:1::808:808",
    "192.0.0.8",
    "192.88.99.1",
    "198.18.0.1",
    "203.0.113.5",
    "240.0.0.1",
    "255.255.255.255",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",  # Teredo
    "2001:db8::1",
    "3fff::1",
    "5f00::1",
    "fec0::1",
    "ff02::1",
    "100::1",
    "::ffff:0:7f00:1",
]


def test_which_addresses_are_public():
    assert [address for address in PRIVATE if is_public(address)] == []
    assert all(
        map(is_public, ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "::8.8.8.8", "64:ff9b::808:808", "2002:808:808::"])
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0x7f.1", "2130706433", "0", "[::ffff:127.0.0.1]"])
def test_this_machine_is_not_asked(server, host, tmp_path):
    Server.seen.clear()
    with pytest.raises(UserError, match=r"private network|unknown"):
        fetch_image(f"http://{host}:{server.rpartition(':')[2]}/red", QUICK, tmp_path)
    assert Server.seen == []


@pytest.fixture
def connected(server, monkeypatch):
    """The addresses that connections went to; the server of this module stands at all of them."""
    seen, connect = [], httpcore.SyncBackend.connect_tcp

    def to_server(backend, address, port, *options):
        seen.append(address)
        return connect(backend, "127.0.0.1", int(server.rpartition(":")[2]), *options)

    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", to_server)
    return seen


def test_one_private_address_among_a_hosts_is_enough(connected, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", answers("8.8.8.8", "127.0.0.1"))
    with pytest.raises(UserError, match="private network"):
        fetch_image("http://both.example/red", QUICK, tmp_path)
    assert connected == []
    fetch_image("http://both.example/red", QUICK, tmp_path, allow_private=True)
    with pytest.raises(UserError, match="private network"):  # not from the cache either
        fetch_image("http://both.example/red", QUICK, tmp_path)


def test_redirects_are_checked_too(connected, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", answers("8.8.8.8"))
    with pytest.raises(UserError, match="private network"):
        fetch_image("http://open.example/inside", QUICK, tmp_path)
    assert connected == ["8.8.8.8"]


def test_the_address_that_was_checked_is_the_one_connected_to(connected, tmp_path, monkeypatch):
    asked = []

    def rebinding(host, port, *_, **__):
        if host == "rebinding.example":
            asked.append(host)
        return answers("8.8.8.8" if len(asked) == 1 else "127.0.0.1")(host, port)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert fetch_image("http://rebinding.example/red", QUICK, tmp_path).size == (8, 6)
    assert connected == ["8.8.8.8"] and len(asked) == 1


def test_tls_and_the_host_header_keep_the_name(monkeypatch):
    sent = []

    class Wire(httpcore.MockStream):
        def write(self, buffer, timeout=None):
            sent.append(buffer)

        def start_tls(self, ssl_context, server_hostname=None, timeout=None):
            assert ssl_context.check_hostname
            sent.append(server_hostname)
            return self

    class Network:
        def connect_tcp(self, address, *_):
            sent.append(address)
            return Wire([b"HTTP/1.1 204 No Content\r\n\r\n"])

    monkeypatch.setattr(socket, "getaddrinfo", answers("8.8.8.8"))
    monkeypatch.setattr(httpcore, "SyncBackend", Network)
    with httpx.Client(transport=GuardedTransport(time.monotonic() + 5, 1.0), timeout=None) as client:
        assert client.get("https://name.example/a").status_code == 204
    address, name, head = sent[0], sent[1], b"".join(sent[2:])
    assert (address, name) == ("8.8.8.8", "name.example") and b"\r\nHost: name.example\r\n" in head


def test_a_compressed_answer_is_not_unpacked(fetch):
    with pytest.raises(UserError, match="undecodable"):
        fetch("/zipped")


def test_proxies_are_not_used(fetch, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert fetch("/red").size == (8, 6)


# --- the cache ----------------------------------------------------------------------------------------------------------


def test_an_image_is_fetched_once(fetch, tmp_path):
    fetch("/red")
    assert Server.seen == ["/red"]
    fetch("/red")
    assert Server.seen == []
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(b"torn")
    assert fetch("/red").size == (8, 6) and Server.seen == ["/red"]


def test_an_image_that_a_user_names_is_fetched_again_after_a_while(fetch, tmp_path):
    fetch("/red", max_age=FRESH)
    (kept,) = (tmp_path / "cache").iterdir()
    for age, asked in ((FRESH - 60, []), (FRESH + 60, ["/red"])):
        os.utime(kept, (time.time() - age,) * 2)
        fetch("/red")  # of an index: it stays, and its use makes it no younger
        assert Server.seen == []
        fetch("/red", max_age=FRESH)
        assert Server.seen == asked
    fetch("/red", max_age=FRESH)
    assert Server.seen == []


def test_the_cache_is_bounded(fetch, tmp_path):
    limits = FetchLimits(cache=3 * len(RED))
    for i in range(5):
        fetch(f"/red?{i}", limits)
        time.sleep(0.02)
        fetch("/red?0", limits)  # used lately, and so it stays
    assert len(list((tmp_path / "cache").iterdir())) == 3
    fetch("/red?0")
    assert Server.seen == []
    fetch("/red?1")
    assert Server.seen == ["/red?1"]


def test_what_is_no_image_is_not_kept(fetch, tmp_path):
    with pytest.raises(UserError):
        fetch("/text")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_costs_no_image(fetch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert fetch("/red", cache=tmp_path / "file").size == (8, 6)


def test_open_image_takes_addresses(server, monkeypatch, tmp_path):
    monkeypatch.setenv("FROMAGE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="private network"):
        open_image(f"{server}/red")
    assert list(tmp_path.iterdir()) == []
