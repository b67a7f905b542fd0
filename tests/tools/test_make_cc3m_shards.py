"""The tool with a stand-in for img2dataset that keeps its files as img2dataset 1.47 does."""

import http.server
import json
import os
import runpy
import sys
import tarfile
import threading
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from test_shards import image, read

from fromage.data.shard_names import expand
from fromage.data.shard_sizes import read_sizes, shard_sizes

TOOL = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "make_cc3m_shards.py"))
STAND_IN = """
import collections, io, json, math, os, tarfile, urllib.request
from pathlib import Path

def download(url_list, output_folder, number_sample_per_shard, timeout, input_format, url_col, caption_col, **options):
    import pyarrow.parquet as pq
    assert input_format == "parquet" and options["incremental_mode"] == "incremental"
    out, rows, limit = Path(output_folder), pq.read_table(url_list).to_pylist(), int(os.environ.get("STOP_AFTER", 99))
    (out / "options.txt").write_text(json.dumps(options))
    done = {int(path.name.split("_")[0]) for path in out.glob("*.json")}  # fails for any other JSON
    digits = 5 + math.ceil(math.log10(number_sample_per_shard))
    for shard in range(-(-len(rows) // number_sample_per_shard)):
        if shard in done:
            continue
        said, start = collections.Counter(), shard * number_sample_per_shard
        with tarfile.open(out / f"{shard:05d}.tar", "w") as tar:
            for place, row in enumerate(rows[start:start + number_sample_per_shard]):
                if limit == 0:
                    os._exit(9)  # in the midst of a shard
                try:
                    data = urllib.request.urlopen(row[url_col], timeout=timeout).read()
                    assert data.startswith(bytes([255, 216])), "Image decoding error"
                except Exception as error:
                    said[str(error)] += 1
                    continue
                said["success"] += 1
                key = f"{10 ** (digits - 5) * shard + place:0{digits}d}"
                members = {"jpg": data, "txt": row[caption_col].encode(), "json": json.dumps(row).encode()}
                for kind, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        stats = {"count": said.total(), "successes": said["success"], "status_dict": said}
        (out / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
        limit -= 1
"""


@pytest.fixture(scope="module")
def server():
    """An address under which /N.jpg is an image, and /gone, /text and /slow are what they say."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/gone":
                self.send_error(404)
            elif self.path == "/slow":
                stop.wait(20)
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<html>" if self.path == "/text" else image(colour=int(Path(self.path).stem)))

        def log_message(self, *_):
            pass

    stop = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        stop.set()
        httpd.shutdown()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A stand-in for img2dataset and albumentations on the path of every Python."""
    path = tmp_path / "packages"
    path.mkdir()
    (path / "img2dataset.py").write_text(STAND_IN)
    (path / "albumentations.py").write_text("smallest_max_size = None\n")
    monkeypatch.setenv("PYTHONPATH", str(path))
    return path


@pytest.fixture
def call(tmp_path, stand_in, capfd):
    """The tool on tmp_path/x.tsv and tmp_path/out: its exit code and what it printed."""

    def run(*options, out="out"):
        words = [str(tmp_path / "x.tsv"), "--out", str(tmp_path / out), "--img2dataset", sys.executable]
        code = TOOL["main"]([*words, "--per-shard", "4", "--timeout", "1", *map(str, options)])
        said = capfd.readouterr()
        return code, said.out, said.err

    return run


def write_tsv(path, server, *more):
    """Ten images, and more lines."""
    lines = [f"caption {i}\t{server}/{i}.jpg".encode() for i in range(10)]
    path.write_bytes(b"\n".join([*lines, *more]) + b"\n")


def test_every_pair_is_there_or_in_the_report(tmp_path, call, server):
    bad = [
        b"gone\tSERVER/gone",
        b"also\tSERVER/gone",
        b"page\tSERVER/text",
        b"late\tSERVER/slow",
        b"refused\thttp://127.0.0.1:1/",
    ]
    odd = [b'"half a quote\tSERVER/10.jpg', "emoji 😀\tSERVER/11.jpg\textra".encode()]
    no = [b"\xff\tSERVER/1.jpg", b"no tab", b"\tSERVER/2.jpg", b"file\tfile:///etc/hostname", b""]
    write_tsv(tmp_path / "x.tsv", server, *(line.replace(b"SERVER", server.encode()) for line in (*bad, *odd, *no)))
    code, said, _ = call()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert code == 0 and (report["asked"], report["came"], report["unfinished_shards"]) == (21, 12, 0)
    assert {cause: row["pairs"] for cause, row in report["lost"].items()} == {
        "line without caption and http address": 3,
        "HTTP 404 Not Found": 2,
        "undecodable image": 1,
        "no answer in time": 1,
        "connection failed": 1,
        "line is not UTF-8": 1,
    }
    assert report["lost"]["HTTP 404 Not Found"]["share"] == pytest.approx(2 / 21)
    assert "12 |  57.14% |" in said and said.rstrip() == (tmp_path / "out/report.md").read_text().rstrip()
    shards = expand(str(tmp_path / "out"))
    samples = [read(shard)[0] for shard in shards]
    assert [len(some) for some in samples] == shard_sizes(shards) == [4, 4, 2, 1, 1]
    captions = [sample["txt"].decode() for some in samples for sample in some]
    assert captions == [*(f"caption {i}" for i in range(10)), '"half a quote', "emoji 😀"]
    assert samples[0][3]["jpg"] == image(colour=3) and samples[0][3]["__key__"] == "000003"


def test_a_run_that_was_stopped_goes_on(tmp_path, call, server, monkeypatch):
    write_tsv(tmp_path / "x.tsv", server)
    monkeypatch.setenv("STOP_AFTER", "1")
    code, _, error = call()
    assert code == 2 and "exit code 9" in error and "goes on" in error
    assert not any((tmp_path / "out").glob("*.tar"))
    (tmp_path / "out/download/00002_stats.json").write_text('{"count"')  # as a kill may leave it
    code, *_ = call()
    assert code == 2 and read_sizes(tmp_path / "out") == {"00000.tar": 4}
    first = (tmp_path / "out/00000.tar").stat()
    monkeypatch.delenv("STOP_AFTER")
    assert call()[0] == 0
    assert read_sizes(tmp_path / "out") == {"00000.tar": 4, "00001.tar": 4, "00002.tar": 2}
    assert (tmp_path / "out/00000.tar").stat().st_mtime_ns == first.st_mtime_ns
    (tmp_path / "out/00001.tar").unlink()  # is fetched again
    (tmp_path / "out/sizes.json").unlink()  # is made again
    code, table, _ = call()
    assert code == 0 and "100.00%" in table and sum(read_sizes(tmp_path / "out").values()) == 10


def test_what_was_lost_with_the_network_is_fetched_again(tmp_path, call, server):
    tsv = tmp_path / "x.tsv"
    tsv.write_text("".join(f"caption {i}\thttp://127.0.0.1:1/{i}.jpg\n" for i in range(4)))
    code, table, error = call()
    assert code == 2 and "no pair came (connection failed)" in error and "--refetch-below" in error and "100.00%" in table
    now = tmp_path / "now.tsv"
    now.write_text("".join(f"caption {i}\t{server}/{i}.jpg\n" for i in range(4)))
    TOOL["read_tsv"](now, tmp_path / "out/download/input/pairs.parquet")  # the same pairs, and their hosts answer
    assert call()[0] == 2  # the shard counts as done
    code, table, _ = call("--refetch-below", "0.5")
    assert code == 0 and "came  |           4 | 100.00% |" in table and read_sizes(tmp_path / "out") == {"00000.tar": 4}


def test_options_reach_img2dataset(tmp_path, call, server):
    write_tsv(tmp_path / "x.tsv", server)
    call("--size", 384, "--quality", 90, "--processes", 3, "--threads", 7, "--retries", 2)
    options = json.loads((tmp_path / "out/download/options.txt").read_text())
    wanted = {"resize_mode": "keep_ratio", "image_size": 384, "encode_quality": 90, "processes_count": 3, "thread_count": 7}
    assert options.items() >= (wanted | {"retries": 2, "resize_only_if_bigger": True, "skip_reencode": True}).items()
    call("--original", out="other")
    options = json.loads((tmp_path / "other/download/options.txt").read_text())
    assert options["resize_mode"] == "no" and "image_size" not in options


def test_other_pairs_or_images_are_not_mixed_in(tmp_path, call, server):
    write_tsv(tmp_path / "x.tsv", server)
    call()
    for options in (["--size", "512"], ["--original"], ["--quality", "80"]):
        code, _, error = call(*options)
        assert code == 2 and "was begun with x.tsv, per_shard 4, size 256, quality 95" in error
    assert call("--threads", "3")[0] == 0
    write_tsv(tmp_path / "x.tsv", server, b"one more\thttp://example.invalid/")
    assert "was begun with" in call()[2]


def test_what_a_killed_run_left_behind_is_ended(tmp_path, call, server):
    write_tsv(tmp_path / "x.tsv", server)
    wait = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    folders = (tmp_path / "out/download", tmp_path / "other/download")
    here, there = (Popen(wait, stdout=PIPE, env=os.environ | {"FROMAGE_CC3M": str(folder)}) for folder in folders)
    assert [child.stdout.read(1) for child in (here, there)] == [b"\n", b"\n"]
    try:
        assert call()[0] == 0
        assert here.wait(5) == -9 and there.poll() is None
    finally:
        for child in (here, there):
            child.kill()
            child.wait()
            child.stdout.close()


def test_two_runs_do_not_share_a_folder(tmp_path, call, server):
    write_tsv(tmp_path / "x.tsv", server)
    held = tmp_path / "out/download/input"
    held.mkdir(parents=True)
    with TOOL["lock"](held):
        code, _, error = call()
    assert code == 2 and "in use by another run" in error and error.count("\n") == 1


def test_bad_input_is_one_line(tmp_path, call, stand_in, monkeypatch):
    def refused(*options, **named):
        code, _, error = call(*options, **named)
        assert code == 2 and error.startswith("make_cc3m_shards: ") and error.count("\n") == 1
        return error

    assert "x.tsv is missing" in refused()
    for text in ("", "only a caption\n", "http://a.b/c.jpg\ta caption\n"):
        (tmp_path / "x.tsv").write_text(text)
        assert "holds no pair" in refused()
    (tmp_path / "x.tsv").write_text("a\thttp://127.0.0.1:1/\n")
    (tmp_path / "file").touch()
    assert "no folder that can be written to" in refused(out="file")
    (tmp_path / "mine").mkdir()
    with tarfile.open(tmp_path / "mine/00000.tar", "w"):
        pass
    assert "shards of another origin" in refused(out="mine")
    (stand_in / "albumentations.py").write_text("")
    assert "cannot run img2dataset (AttributeError" in refused() and "albumentations==1.4.16" in refused()
    assert "No such file" in refused("--img2dataset", tmp_path / "nowhere/python")


def test_an_environment_is_made_once_and_none_without_network(tmp_path, stand_in, monkeypatch, capfd):
    def create(home, **_):
        made.append(home)
        (home / "bin").mkdir(parents=True)
        (home / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (home / "bin" / "python").chmod(0o755)

    made, home = [], tmp_path / "cache" / "img2dataset"
    monkeypatch.setattr(TOOL["venv"], "create", create)
    monkeypatch.setitem(TOOL["find_img2dataset"].__globals__, "PACKAGES", ["no-such-package-as-this==0"])
    settings = {"FROMAGE_CACHE": home.parent, "PIP_NO_INDEX": 1, "PIP_FIND_LINKS": tmp_path, "PYTHONPATH": tmp_path}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(TOOL["UserError"], match=r"cannot be installed .*network.*--img2dataset") as error:
        TOOL["find_img2dataset"](None)
    assert "\n" not in str(error.value) and made == [home] and not home.exists()
    monkeypatch.setenv("PYTHONPATH", str(stand_in))
    create(home)
    assert TOOL["find_img2dataset"](None) == home / "bin" / "python" and len(made) == 2


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("HTTP Error 404: Not Found", "HTTP 404 Not Found"),
        ("HTTP Error 999: Request denied", "HTTP 999"),
        ("<urlopen error timed out>", "no answer in time"),
        ("<urlopen error _ssl.c:980: The handshake operation timed out>", "no answer in time"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "no valid certificate"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "name server does not answer"),
        ("<urlopen error [Errno -2] Name or service not known>", "host not found"),
        ("<urlopen error [Errno 111] Connection refused>", "connection failed"),
        ("Remote end closed connection without response", "connection failed"),
        ("IncompleteRead(3 bytes read)", "connection failed"),
        ("Use of image disallowed by X-Robots-Tag directive", "refused by X-Robots-Tag"),
        ("Image decoding error", "undecodable image"),
        ("URL can't contain control characters. '/a b'", "unusable address"),
        ("'ascii' codec can't encode character", "unusable address"),
        ("something new", "other"),
    ],
)
def test_messages_have_causes(message, cause):
    assert TOOL["cause_of"](message) == cause
