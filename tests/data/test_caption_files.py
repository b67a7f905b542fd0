import json

import pytest

from fromage.data.caption_files import Skipped, by_image, read_captions, tsv_pairs
from fromage.errors import UserError

FILES = {
    "a.tsv": "a star\tx.jpg\na second\t./x.jpg\na moon\tsub/y.jpg\n",
    "a.jsonl": '{"image": "x.jpg", "captions": ["a star", "a second"]}\n{"file_name": "sub/y.jpg", "text": "a moon"}\n',
    "a.json": '{"x.jpg": ["a star", "a second"], "sub/y.jpg": " a moon "}',
    "coco.json": json.dumps(
        {
            "images": [{"id": 1, "file_name": "x.jpg"}, {"id": 2, "file_name": "sub/y.jpg"}],
            "annotations": [{"image_id": i, "caption": said} for i, said in ((1, "a star"), (2, "a moon"), (1, "a second"))],
        }
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_first_caption_of_each_image(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    folder = tmp_path / "images"
    assert read_captions(tmp_path / name, folder) == {f"{folder}/x.jpg": "a star", f"{folder}/sub/y.jpg": "a moon"}


def test_what_is_no_pair_is_named_by_cause(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"no tab" + b" " * 64 + b"\na\tx.jpg\n\xff\tx.jpg\n \tx.jpg\nb\tx\0.jpg\n\n")
    skipped = Skipped()
    (found,) = by_image(tsv_pairs(tmp_path / "a.tsv", tmp_path, skipped), skipped)
    assert (found.key, found.captions) == ("000000002", ["a"])
    assert skipped.names == {
        "no tab and image": ["line 1"],
        "not UTF-8": ["line 3"],
        "empty caption": [f"000000004 {tmp_path}/x.jpg"],
        "null byte in the image's name": ["line 5"],
    }
    assert set(skipped.skipped.values()) == {1}


def test_a_file_of_odd_lines_is_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("no tab\n" * 3 + "a\tx.jpg\n")
    with pytest.raises(UserError, match=r"a\.tsv.*line 1: no tab and image"):
        read_captions(tmp_path / "a.tsv", tmp_path)
