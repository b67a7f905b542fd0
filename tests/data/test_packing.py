import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from test_shards import SHARED, image, read

from fromage.data.packing import pack_coco, pack_tsv
from fromage.data.shards import read_sizes
from fromage.errors import UserError


def test_pack_tsv(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes(image())
    (images / "b.png").write_bytes(image("PNG", "RGBA", (1, 2, 3, 4)))
    (images / "c.jpg").write_bytes(b"broken")
    lines = [
        b"one\ta.jpg",
        b"two\tb.png\textra",
        b"three\tc.jpg",
        b"four\tnone.jpg",
        b"\ta.jpg",
        b"five",
        b"",
        b"\xff\ta.jpg",
    ]
    (tmp_path / "x.tsv").write_bytes(b"\r\n".join(lines))
    report = pack_tsv(tmp_path / "x.tsv", tmp_path / "s", images)
    assert report.pairs == 2
    assert report.skipped == dict.fromkeys(
        ["undecodable image", "missing image", "empty caption", "no tab and image", "not UTF-8"], 1
    )
    written = json.loads((tmp_path / "s/report.json").read_text())
    assert written["skipped"] == report.skipped
    assert "none.jpg" in written["names"]["missing image"][0]
    one, two = read(tmp_path / "s/00000.tar")[0]
    assert one["jpg"] == image()
    assert (one["__key__"], one["txt"], two["__key__"]) == ("000000001", b"one", "000000002")
    assert Image.open(io.BytesIO(two["jpg"])).format == "JPEG"


def test_pack_tsv_of_nothing_is_an_error(tmp_path):
    (tmp_path / "x.tsv").write_text("one\tnone.jpg\n")
    with pytest.raises(UserError, match="missing image: 1"):
        pack_tsv(tmp_path / "x.tsv", tmp_path / "s")
    with pytest.raises(UserError, match="is missing"):
        pack_tsv(tmp_path / "y.tsv", tmp_path / "t")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"images": [{"id": 1}], "annotations": []}'])
def test_pack_coco_refuses_other_files(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match=r"c\.json: is .*captions_train2017"):
        pack_coco(tmp_path / "c.json", tmp_path, tmp_path / "s")


@pytest.mark.skipif(not (SHARED / "coco_sample").is_dir(), reason="the COCO sample is not here")
def test_pack_coco_sample(tmp_path):
    coco = SHARED / "coco_sample"
    report = pack_coco(coco / "captions_val2017_sample.json", coco / "val2017", tmp_path / "all", per_shard=200)
    assert (report.pairs, report.skipped) == (641, {})
    assert list(read_sizes(tmp_path / "all").values()) == [200, 200, 200, 41]
    first = read(tmp_path / "all/00000.tar")[0][0]
    source = json.loads(first["json"])["source"]
    assert first["jpg"] == (coco / "val2017" / source).read_bytes()
    assert first["__key__"] == f"{int(Path(source).stem)}_0"
    report = pack_coco(coco / "captions_val2017_sample.json", coco / "val2017", tmp_path / "first", captions="first")
    assert report.pairs == 128


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_a_tsv_of_any_unicode_encoding(tmp_path, encoding):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    text = "\ufeffein Bär\ta.jpg\r\nzwei\ta.jpg\r\n" if encoding == "utf-16-be" else "ein Bär\ta.jpg\r\nzwei\ta.jpg\r\n"
    (tmp_path / "a.tsv").write_text(text, encoding=encoding, newline="")
    assert pack_tsv(tmp_path / "a.tsv", tmp_path / "s").pairs == 2
    with tarfile.open(tmp_path / "s" / "00000.tar") as tar:
        assert tar.extractfile("000000001.txt").read().decode() == "ein Bär"


def test_a_tsv_in_utf16_without_a_mark_is_told(tmp_path):
    (tmp_path / "a.tsv").write_text("a\ta.jpg\n", encoding="utf-16-le")
    with pytest.raises(UserError, match=r"null bytes, as UTF-16 without a byte order mark.*save it as UTF-8"):
        pack_tsv(tmp_path / "a.tsv", tmp_path / "s")


def test_odd_entries_of_a_caption_file_are_skipped_and_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": None}]
    said = ["a", None, 5, ["a", "b"], "half \ud83d"]
    notes = [{"image_id": 1, "caption": text} for text in said] + [{"image_id": 2, "caption": "b"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": notes}))
    report = pack_coco(tmp_path / "c.json", tmp_path, tmp_path / "s")
    assert (report.pairs, report.skipped) == (1, {"odd entry": 6})
    assert report.names["odd entry"][1] == "annotations[1].caption (annotations[1].caption is null, not a text)"
