import bz2
import functools
import gzip
import http.server
import io
import json
import lzma
import os
import socket
import sys
import tarfile
import threading
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from fromage.data.broken import Broken, read_shards
from fromage.data.shard_names import expand, shard_name
from fromage.data.shard_sizes import read_sizes, shard_sizes, sized, total
from fromage.data.shard_writer import write_shards
from fromage.data.shards import image_of, read_shard
from fromage.errors import BrokenSample, UserError

SHARED = Path(os.environ.get("FROMAGE_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def image(kind="JPEG", mode="RGB", colour=120):
    buffer = io.BytesIO()
    Image.new(mode, (12, 8), colour).save(buffer, kind)
    return buffer.getvalue()


def pairs(n):
    return [(f"k{i:03d}", image(colour=i), f"caption {i} – ü", {"n": i}) for i in range(n)]


def read(shard):
    lost = []
    return list(read_shard(str(shard), lambda *why: lost.append(why))), lost


def test_written_shards_are_read_back(tmp_path):
    assert write_shards(iter(pairs(5)), tmp_path / "s", per_shard=2) == 5
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["00000.tar", "00001.tar", "00002.tar", "sizes.json"]
    assert read_sizes(tmp_path / "s") == {"00000.tar": 2, "00001.tar": 2, "00002.tar": 1}
    samples = [sample for shard in expand(str(tmp_path / "s")) for sample in read(shard)[0]]
    found = [(s["__key__"], s["jpg"], s["txt"].decode(), json.loads(s["json"])) for s in samples]
    assert found == pairs(5)


def test_the_samples_of_shards_together_are_known_where_each_size_is(tmp_path):
    write_shards(pairs(5), tmp_path / "s", per_shard=2)
    known = sized(expand(str(tmp_path / "s")))
    assert total(known) == 5 and total([]) == 0
    (tmp_path / "s/00003.tar").write_bytes((tmp_path / "s/00000.tar").read_bytes())  # sizes.json does not name it
    assert total(sized(expand(str(tmp_path / "s")))) is None


def test_equal_samples_make_equal_bytes(tmp_path):
    for name in "ab":
        write_shards(pairs(3), tmp_path / name)
    tar = (tmp_path / "a/00000.tar").read_bytes()
    assert tar == (tmp_path / "b/00000.tar").read_bytes()
    with tarfile.open(tmp_path / "a/00000.tar") as members:
        assert {(m.mtime, m.uid, m.uname) for m in members} == {(0, 0, "fromage")}


def test_an_interrupted_write_leaves_whole_shards_only(tmp_path):
    def stops():
        yield from pairs(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(stops(), tmp_path / "s", per_shard=2)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["00000.tar", "sizes.json"]
    assert read_sizes(tmp_path / "s") == {"00000.tar": 2}
    with pytest.raises(UserError, match="holds shards already"):
        write_shards(pairs(1), tmp_path / "s")


@pytest.mark.parametrize("key", ["", "a.b", "k000"])
def test_a_key_that_would_not_come_back_is_refused(tmp_path, key):
    with pytest.raises(UserError, match="own key"):
        write_shards([*pairs(1), (key, b"", "x", {})], tmp_path / "s")


def test_expand_braces_globs_folders_and_lists(tmp_path):
    folder = tmp_path / "s"
    write_shards(pairs(4), folder, per_shard=1)
    every = [str(folder / f"0000{i}.tar") for i in range(4)]
    assert expand(str(folder)) == expand(f"{folder}/{{00000..00003}}.tar") == expand(f"{folder}/*.tar") == every
    assert expand([every[2], f"{folder}/0000{{0,1}}.tar"]) == [every[2], every[0], every[1]]
    odd = tmp_path / "a{b}[c]"
    odd.mkdir()
    (folder / "00000.tar").rename(odd / "x.tar")
    assert expand(str(odd / "x.tar")) == [str(odd / "x.tar")]


def test_expand_names_what_is_missing(tmp_path):
    write_shards(pairs(2), tmp_path / "s", per_shard=1)
    with pytest.raises(UserError, match=r"00002\.tar is missing"):
        expand(f"{tmp_path}/s/{{00000..00002}}.tar")
    for empty in (f"{tmp_path}/none*.tar", str(tmp_path)):
        with pytest.raises(UserError, match=r"holds no \.tar"):
            expand(empty)
    with pytest.raises(UserError, match="do not match"):
        expand("a{0.tar")
    with pytest.raises(UserError, match="no shards are named"):
        expand([])


def test_urls_and_commands_are_left_as_they_are():
    web = ["https://h/0.tar?a=1&b=$(id)", "https://h/1.tar?a=1&b=$(id)"]
    assert expand("https://h/{0..1}.tar?a=1&b=$(id)") == web
    assert expand("hdfs://b/x.tar") == ["hdfs://b/x.tar"]
    assert expand("hf://datasets/a/b/x.tar") == ["hf://datasets/a/b/x.tar"]
    assert expand("pipe:cat x.tar") == ["pipe:cat x.tar"]
    assert [shard_name(s) for s in (web[0], "pipe:cat 's/x.tar' -", "/a.tar/b.tar")] == ["0.tar", "x.tar", "b.tar"]
    assert expand("https://h/" + "x" * 5000 + ".tar")[0].startswith("https")


@pytest.mark.parametrize(("url", "package"), [("s3://b/x.tar", "s3fs"), ("gs://b/x.tar", "gcsfs")])
def test_the_package_that_reads_a_protocol_is_named_before_anything_runs(monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}.*pipe:COMMAND"):
        expand(url)
    with pytest.raises(UserError, match="not known"):
        expand("odd://b/x.tar")


def test_shards_come_from_any_file_system_of_fsspec(tmp_path):
    memory = fsspec.filesystem("memory")
    write_shards(pairs(3), tmp_path / "s", per_shard=2)
    for file in (tmp_path / "s").iterdir():
        memory.pipe(f"/s/{file.name}", file.read_bytes())
    shards = expand("memory://s/{00000..00001}.tar")
    assert shard_sizes(shards) == [2, 1]
    assert [sample["__key__"] for shard in shards for sample in read(shard)[0]] == ["k000", "k001", "k002"]


@pytest.fixture
def server(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_shards_come_over_http(server, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    write_shards(pairs(4), tmp_path / "s", per_shard=2)
    shards = expand(f"{server}/s/{{00000..00002}}.tar")
    assert shard_sizes(shards) == [2, 2, None]
    assert [len(read(shard)[0]) for shard in shards] == [2, 2, 0]
    ((name, cause),) = read(shards[2])[1]
    assert name == "00002.tar"
    assert "unreadable" in cause


@pytest.mark.parametrize("sizes", ["[1]", "no JSON"])
def test_sizes_that_cannot_be_read_over_http_are_logged(server, tmp_path, caplog, sizes):
    (tmp_path / "sizes.json").write_text(sizes)
    assert shard_sizes([f"{server}/00000.tar"]) == [None]
    assert "sizes.json cannot be read" in caplog.text
    (tmp_path / "sizes.json").unlink()
    caplog.clear()
    assert shard_sizes([f"{server}/00000.tar", "pipe:cat x.tar", f"{server}/x.tar?a=1"]) == [None] * 3
    assert caplog.text == ""


def test_a_server_that_stalls_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("fromage.data.shard_streams.STALLED", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as stalled:  # takes connections and never answers
        samples, lost = read(*expand(f"http://127.0.0.1:{stalled.getsockname()[1]}/00007.tar"))
    assert samples == []
    assert [name for name, _ in lost] == ["00007.tar"]


def test_a_server_that_breaks_off_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    write_shards(pairs(4), tmp_path / "s")
    tar, asked = (tmp_path / "s/00000.tar").read_bytes(), []

    class BreaksOff(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(tar)))
            self.end_headers()

        def do_GET(self):
            asked.append(self.path)
            self.do_HEAD()
            self.wfile.write(tar if len(asked) > 2 else tar[:8000])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), BreaksOff) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        samples, lost = read(f"http://127.0.0.1:{running.server_port}/00000.tar")
        running.shutdown()
    assert [s["__key__"] for s in samples] == ["k000", "k001", "k002", "k003"]
    assert not lost and len(asked) == 3


def test_a_command_that_stalls_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("fromage.data.shard_streams.PATIENCE", 0.5)
    monkeypatch.setattr("fromage.data.shards.ATTEMPTS", 1)
    write_shards(pairs(4), tmp_path / "s")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "s/00000.tar").read_bytes()[:8000])
    samples, lost = read(f"pipe:cat {tmp_path}/cut.tar; echo $$ > {tmp_path}/pid; sleep 600 # x.tar")
    assert 0 < len(samples) < 4
    assert lost[0][0] == "x.tar" and "nothing came for 0.5 seconds" in lost[0][1]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_shard_is_taken_up_where_the_connection_broke(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    write_shards(pairs(4), tmp_path / "s")
    whole, cut, tried = tmp_path / "s/00000.tar", tmp_path / "cut.tar", tmp_path / "tried"
    cut.write_bytes(whole.read_bytes()[:8000])
    samples, lost = read(f"pipe:if [ -e {tried} ]; then cat {whole}; else touch {tried}; cat {cut}; fi")
    assert [s["__key__"] for s in samples] == ["k000", "k001", "k002", "k003"]
    assert not lost


def test_an_empty_shard_is_reported(tmp_path):
    tarfile.open(tmp_path / "0.tar", "w").close()
    assert read(tmp_path / "0.tar") == ([], [("0.tar", "empty: holds no sample")])


@pytest.mark.parametrize("keep", [0, 1, 700, 5000, 7000])
def test_a_truncated_shard_ends_and_is_reported(tmp_path, keep):
    write_shards(pairs(4), tmp_path / "s")
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "s/00000.tar").read_bytes()[:keep])
    samples, lost = read(cut)
    assert len(samples) < 4
    assert all({"jpg", "txt", "json"} <= s.keys() for s in samples[:-1])
    assert [name for name, _ in lost] == ["cut.tar"]


def test_a_shard_that_was_closed_too_early_is_found_by_its_size(tmp_path):
    write_shards(pairs(4), tmp_path / "s")
    shard = tmp_path / "s/00000.tar"
    with tarfile.open(shard) as members:
        end = next(m.offset for m in members if m.name.startswith("k002"))
    shard.write_bytes(shard.read_bytes()[:end] + bytes(1024))  # a tar's end
    broken = Broken(0.05)
    assert len(list(read_shards([(str(shard), *shard_sizes([str(shard)]))], broken))) == 2
    broken.used()
    broken.used()
    with pytest.raises(UserError, match=r"2 of 4 samples.*00000\.tar"):
        broken.check(end=True)


def test_samples_that_a_shard_lacks_are_logged_and_judged_at_the_end(caplog):
    broken = Broken(0.4, "data.max_broken", good=100)
    broken.lacks("s/00003.tar", 30, 130)
    assert "s/00003.tar holds 30 samples, sizes.json says 130" in caplog.text
    broken.used()  # more than a hundred samples: what is lost counts now, what is lacking at the end alone
    with pytest.raises(
        UserError, match=r"^100 of 201 .*data\.max_broken allows 40.*; the last: 00003\.tar \(30 samples of 130\);"
    ):
        broken.check(end=True)


def test_a_worker_that_uses_part_of_what_it_reads_answers_for_its_share_of_what_is_lost(caplog):
    broken = Broken(0.1, good=10, bad=0)
    broken.passed(40)
    broken.lose("a.tar", "torn")
    broken.lacks("b.tar", 0, 3)
    broken.check(end=True)  # a quarter of 4 lost samples, of 11
    broken.lacks("c.tar", 0, 1)
    with pytest.raises(UserError, match=r"^2 of 12 samples"):
        broken.check(end=True)


def test_a_resumed_worker_counts_on():
    broken = Broken(0.5, good=6, bad=2)
    broken.used()
    broken.add("k", "torn")
    assert (broken.taken, broken.good, broken.bad) == (10, 7, 3)


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "L")])
def test_images_of_every_mode_become_rgb(kind, mode):
    read = image_of({"jpg": image(kind, mode, 0)})
    assert (read.mode, read.size) == ("RGB", (12, 8))


@pytest.mark.parametrize("data", [b"", b"no image", image()[:-30], image("PNG")[:40]])
def test_undecodable_images_are_broken(data):
    with pytest.raises(BrokenSample, match=r"^undecodable image: "):
        image_of({"jpg": data})


def odd_tar(path):
    """A shard with a good sample, and beside it members that are links, a device, too large, or named in Latin-1."""
    with tarfile.open(path, "w:gz", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:

        def add(name, data=b"", **fields):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))

        add("a.jpg", type=tarfile.SYMTYPE, linkname="../elsewhere.jpg")
        add("a.jpg", image())
        add("a.txt", b"a star")
        add("b.jpg", type=tarfile.LNKTYPE, linkname="a.jpg")
        add("c.jpg", type=tarfile.CHRTYPE)
        add("folder", type=tarfile.DIRTYPE)
        add("caf\xe9.txt", b"a ring")
        add("__meta__", b"x")


def test_a_member_that_is_no_plain_file_is_counted_and_named(tmp_path):
    odd_tar(tmp_path / "0.tar")
    lost = []
    samples = list(read_shard(str(tmp_path / "0.tar"), lambda *told: lost.append(told)))
    assert [sample["__key__"] for sample in samples] == ["a"] and samples[0]["jpg"] == image()
    told = [cause.removeprefix("unusable member: ") for name, cause in lost if name == "0.tar"]
    assert told == [
        "a.jpg is no plain file", "b.jpg is no plain file", "c.jpg is no plain file",
        "caf?.txt has a name that is not UTF-8",
    ]  # fmt: skip


def test_what_a_member_claims_is_not_allocated(tmp_path):
    huge = tarfile.TarInfo("a.jpg")
    huge.size = 1 << 40
    (tmp_path / "0.tar").write_bytes(huge.tobuf() + b"x" * 1024)
    sparse = tarfile.TarInfo("b.jpg")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"77777777777\0"  # the real size: 8 GiB
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:512]) + 8 * 32)
    (tmp_path / "1.tar").write_bytes(bytes(header) + bytes(10240 - 512))
    lost = []
    for name in ("0.tar", "1.tar"):
        assert list(read_shard(str(tmp_path / name), lambda *told: lost.append(told))) == []
    assert any("member a.jpg claims 1,099,511,627,776 bytes, more than 134,217,728" in cause for _, cause in lost)
    assert any("b.jpg claims 8,589,934,591 bytes" in cause for _, cause in lost)


def test_shards_are_replaced_only_where_that_is_said(tmp_path):
    written = lambda n: [(str(i), b"jpg", "words", {}) for i in range(n)]  # noqa: E731
    assert write_shards(written(3), tmp_path, per_shard=1) == 3
    with pytest.raises(UserError, match=r"holds shards already.*--overwrite"):
        write_shards(written(1), tmp_path)
    assert write_shards([], tmp_path, overwrite=True) == 0  # nothing to put in their place
    assert len(list(tmp_path.glob("*.tar"))) == 3
    assert write_shards(written(1), tmp_path, overwrite=True) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "sizes.json"]
    assert read_sizes(tmp_path) == {"00000.tar": 1}


def test_a_full_disk_is_one_line_and_leaves_whole_shards(tmp_path, disk):
    samples = [("a", b"jpg", "words", {}), ("b", bytes(20_000), "words", {})]
    disk(12_000)
    with pytest.raises(UserError, match=r"00001\.tar: cannot be written \(File too large\); whole shards before it: 1"):
        write_shards(samples, tmp_path, per_shard=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "sizes.json"]


def test_shards_that_another_process_writes_are_refused(tmp_path, other_writer):
    pid = other_writer(tmp_path / "out")
    with pytest.raises(UserError, match=f"out: is in use by process {pid}"):
        write_shards([("a", b"jpg", "words", {})], tmp_path / "out", overwrite=True)


def test_shards_that_hold_more_than_sizes_json_says_are_told(tmp_path):
    """Else a validation would end before its last samples."""
    write_shards([(f"k{i}", b"jpeg", "a dog", {}) for i in range(3)], tmp_path)
    (tmp_path / "sizes.json").write_text('{"00000.tar": 2}')
    with pytest.raises(UserError, match=r"00000.tar: holds more samples than the 2 that sizes.json beside it says; remove"):
        list(read_shards(sized(expand(str(tmp_path))), Broken(1.0)))


def odd_end(data, end):
    """A tar of samples of 2 KiB: whole, cut between samples, between members, or with a hole, of zeros."""
    at = 5 * 2048
    cut = {"whole": data, "between samples": data[:at], "between members": data[: at + 1024]}
    return cut[end] if end in cut else data[:at] + bytes(512) + data[at + 512 :]


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("whole", ""),
        ("between samples", "its end is missing"),
        ("between members", "its end is missing"),
        ("hole", "there is more behind its end"),
    ],
)
def test_a_shard_that_ends_too_early_is_told(tmp_path, kind, end, why):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(10):
            for suffix in ("jpg", "txt"):
                member = tarfile.TarInfo(f"k{i}.{suffix}")
                member.size = 3
                tar.addfile(member, io.BytesIO(b"abc"))
    data = odd_end(buffer.getvalue(), end)
    compress = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind]
    (tmp_path / "0.tar").write_bytes(compress(data))
    samples, lost = read(tmp_path / "0.tar")
    if why:
        sure = 5 if end == "between members" else 4  # only what follows shows that a sample is whole
        assert [sample["__key__"] for sample in samples] == [f"k{i}" for i in range(sure)]
        assert [cause for _, cause in lost] == [f"truncated or damaged: after {sure} samples, {why}"]
    else:
        assert len(samples) == 10 and not lost
