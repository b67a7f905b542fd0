import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from test_shards import SHARED, image, read

from fromage.cli.main import main
from fromage.data.packing import is_packed, pack_coco, pack_jsonl, pack_tsv
from fromage.data.shard_sizes import read_sizes
from fromage.data.shards import captions_of
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
    report = pack_coco(coco / "captions_val2017_sample.json", coco / "val2017", tmp_path / "all", per_shard=50)
    assert (report.images, report.pairs, report.skipped) == (128, 641, {})
    assert list(read_sizes(tmp_path / "all").values()) == [50, 50, 28]
    first = read(tmp_path / "all/00000.tar")[0][0]
    about = json.loads(first["json"])
    assert first["jpg"] == (coco / "val2017" / about["source"]).read_bytes()
    assert first["__key__"] == str(int(Path(about["source"]).stem))
    published = json.loads((coco / "captions_val2017_sample.json").read_text())["annotations"]
    assert about["captions"] == [a["caption"].strip() for a in published if a["image_id"] == about["image_id"]]
    report = pack_coco(coco / "captions_val2017_sample.json", coco / "val2017", tmp_path / "first", captions="first")
    assert (report.images, report.pairs) == (128, 128)
    assert captions_of(read(tmp_path / "first/00000.tar")[0][0]) == about["captions"][:1]


@pytest.fixture
def photographs(tmp_path):
    """A folder of forty images."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.jpg").write_bytes(image(colour=i))
    return folder


def packed(folder):
    """Key -> captions of all samples of a folder of shards."""
    samples = [sample for shard in sorted(folder.glob("*.tar")) for sample in read(shard)[0]]
    assert len({json.loads(sample["json"])["source"] for sample in samples}) == len(samples)
    assert all(sample["txt"].decode() == json.loads(sample["json"])["captions"][0] for sample in samples)
    return {sample["__key__"]: captions_of(sample) for sample in samples}


SAID = [("0.jpg", "a"), ("1.jpg", "b"), ("./0.jpg", " c "), ("2.jpg", "d"), ("0.jpg", " "), ("1.jpg", "e"), ("0.jpg", "f")]
GROUPED = {"000000001": ["a", "c", "f"], "000000002": ["b", "e"], "000000004": ["d"]}


def test_an_image_on_several_lines_of_a_tsv_is_packed_once(photographs, tmp_path):
    (photographs / "captions.tsv").write_text("".join(f"{text}\t{name}\n" for name, text in SAID))
    report = pack_tsv(photographs / "captions.tsv", tmp_path / "s")
    assert (report.images, report.pairs, report.skipped) == (3, 6, {"empty caption": 1})
    assert packed(tmp_path / "s") == GROUPED and read_sizes(tmp_path / "s") == {"00000.tar": 3}
    assert json.loads((tmp_path / "s/report.json").read_text())["pairs"] == 6


def test_json_lines_give_one_caption_or_several(photographs, tmp_path):
    lines = [json.dumps({"image": name, "caption": text}) for name, text in SAID]
    lines += ["", '{"file_name": "3.jpg", "text": "g"}', '{"image": "3.jpg", "captions": ["h", "g"]}']
    lines += [
        "junk",
        "[" * 100_000,
        "7",
        '{"image": "3.jpg"}',
        '{"image": 3, "caption": "x"}',
        '{"image": "4.jpg", "captions": ["x", 5]}',
    ]
    (photographs / "captions.jsonl").write_text("\n".join(lines))
    report = pack_jsonl(photographs / "captions.jsonl", tmp_path / "s")
    assert report.skipped == {"empty caption": 1, "no JSON": 2, "no image and captions": 4}
    assert packed(tmp_path / "s") == GROUPED | {"000000009": ["g", "h", "g"]}
    with pytest.raises(UserError, match="is missing"):
        pack_jsonl(photographs / "none.jsonl", tmp_path / "t")


def write_tsv(folder, names):
    (folder / "x.tsv").write_text("".join(f"{kind} {name}\t{name}\n" for kind in ("one", "two") for name in names))
    return folder / "x.tsv"


def test_a_split_follows_from_the_images_names_and_stays_when_there_are_more(photographs, tmp_path):
    names = sorted(path.name for path in photographs.glob("*.jpg"))
    sides = {}
    for out, some in (("a", names), ("b", names[30:5:-1])):
        report = pack_tsv(write_tsv(photographs, some), tmp_path / out, val_fraction=0.25)
        sides[out] = {side: packed(tmp_path / out / side) for side in ("train", "val")}
        assert report.images == len(some) and report.pairs == 2 * len(some)
        assert all(len(said) == 2 for side in sides[out].values() for said in side.values()), "an image is on one side"
        assert report.folders == {str(tmp_path / out / side): len(found) for side, found in sides[out].items()}
    whole, part = ({side: {said[0] for said in found.values()} for side, found in sides[out].items()} for out in "ab")
    assert 3 <= len(whole["val"]) <= 17 and not whole["val"] & whole["train"]
    assert part["val"] <= whole["val"] and part["train"] <= whole["train"]


def test_with_overwrite_another_split_leaves_nothing_and_shards_of_others_stay(photographs, tmp_path):
    tsv, out = write_tsv(photographs, sorted(path.name for path in photographs.glob("*.jpg"))), tmp_path / "o"
    pack_tsv(tsv, out / "val")  # a packing of its own
    for fraction, folders in ((0.0, {".", "val"}), (0.25, {"train", "val"}), (0.0, {"."})):
        pack_tsv(tsv, out, val_fraction=fraction, overwrite=True)
        assert {str(path.parent.relative_to(out)) for path in out.rglob("*.tar")} == folders
        assert {str(path.parent.relative_to(out)) for path in out.rglob("sizes.json")} == folders
    for name in ("backup.tar", "00000.tar"):
        other = tmp_path / name
        other.mkdir()
        with tarfile.open(other / name, "w") as tar:
            tar.add(tsv, "a")
        before = (other / name).read_bytes()
        with pytest.raises(UserError, match=f"holds {name}, which is no shard of this command"):
            pack_tsv(tsv, other, overwrite=True)
        assert [path.name for path in other.iterdir()] == [name] and (other / name).read_bytes() == before
    (out / "sizes.json").write_text("damaged")
    assert pack_tsv(tsv, out, overwrite=True).images


def test_a_split_without_an_image_on_one_side_is_refused_before_anything_is_packed(photographs, tmp_path):
    tsv = write_tsv(photographs, ["1.jpg", "2.jpg"])
    with pytest.raises(UserError, match=r"val: none of 2 images falls there; change --val-fraction 0\.0001"):
        pack_tsv(tsv, tmp_path / "s", val_fraction=1e-4)
    with pytest.raises(UserError, match="val_fraction is"):
        pack_tsv(tsv, tmp_path / "s", val_fraction=1.5)
    assert not (tmp_path / "s").exists()
    pack_tsv(write_tsv(photographs, [f"{i}.jpg" for i in range(40)]), tmp_path / "s" / "val")
    with pytest.raises(UserError, match="val holds shards already"):
        pack_tsv(photographs / "x.tsv", tmp_path / "s", val_fraction=0.5)
    assert not (tmp_path / "s" / "train").exists()


def test_the_verb_says_where_what_went_and_names_the_first_of_the_missing(photographs, tmp_path, capsys):
    tsv = write_tsv(photographs, [*(f"{i}.jpg" for i in range(40)), *(f"gone{i}.jpg" for i in range(5))])
    assert main(["shards", "tsv", str(tsv), "--out", str(tmp_path / "s"), "--val-fraction", "0.5"]) == 0
    first, *more = capsys.readouterr().out.splitlines()
    assert first.startswith("40 images with 80 captions packed: ") and f"{tmp_path}/s/train, " in first
    assert first.endswith(f"in {tmp_path}/s/val")
    (missing,) = more
    assert "5 skipped, missing image" in missing and missing.count("photographs/gone") == 3
    assert missing.endswith("and 2 more in report.json")


def test_images_that_are_missing_altogether_or_on_one_side_are_one_line(photographs, tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(40)]
    notes = [{"image_id": i, "caption": f"number {i}"} for i in range(40)]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": notes}))
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "s"
    elsewhere.mkdir()
    told = r"s/train, .*s/val: no image could be packed \(missing image: 40, .*; correct .* or name the folder of its images"
    with pytest.raises(UserError, match=told) as error:
        pack_coco(tmp_path / "c.json", elsewhere, out, val_fraction=0.5)
    assert "\n" not in str(error.value) and not is_packed(out)
    (elsewhere / "3.jpg").write_bytes(image())
    with pytest.raises(UserError, match=r"^[^,]*s/(train|val): no image could be packed \(missing image: 39, "):
        pack_coco(tmp_path / "c.json", elsewhere, out, val_fraction=0.5, overwrite=True)
    assert not is_packed(out) and not is_packed(elsewhere)
    report = pack_coco(tmp_path / "c.json", photographs, out, val_fraction=0.5, overwrite=True)
    assert is_packed(out) and report.images == 40


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_a_tsv_of_any_unicode_encoding(tmp_path, encoding):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    text = "\ufeff" * (encoding == "utf-16-be") + "ein Bär\ta.jpg\r\nauf\u2028zwei\ta.jpg\r\n"
    (tmp_path / "a.tsv").write_text(text, encoding=encoding, newline="")
    assert pack_tsv(tmp_path / "a.tsv", tmp_path / "s").pairs == 2
    with tarfile.open(tmp_path / "s" / "00000.tar") as tar:
        assert tar.extractfile("000000001.txt").read().decode() == "ein Bär"
        assert json.loads(tar.extractfile("000000001.json").read())["captions"] == ["ein Bär", "auf\u2028zwei"]


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
    assert report.names["odd entry"][1] == "annotations[1].caption (is null, not a text)"
