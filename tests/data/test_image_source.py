"""What is kept of an image's own JSON, and of its file."""

import hashlib
import json
import os

import torch
from PIL import Image

from fromage.data import image_source
from fromage.data.image_source import FileStamp, ImageSource, _meta, find_images, without_folders


def test_of_paths_on_the_machine_that_packed_the_name_is_left():
    packed = {"source": "/home/someone/private/a.jpg", "target_image": "/home/someone/b.jpg", "line": 3, "label": "/m/01"}
    shared = {"source": "a.jpg", "target_image": "b.jpg", "line": 3, "label": "/m/01"}
    assert without_folders(packed) == shared and json.loads(_meta(json.dumps(packed).encode())) == shared
    for untouched in ({"source": "dogs/a.jpg"}, {"source": 7}):
        assert without_folders(untouched) == untouched


def read(source):
    """(part, file names, pixels) of each batch with images."""
    batches = [(batch.part, group) for batch in source for group in batch.groups]
    return [
        (part, [sample.item.path.rpartition("/")[2] for sample in some], tensor.tolist()) for part, (tensor, some) in batches
    ]


def test_a_source_of_a_folder_is_read_as_it_is_found_and_parts_of_it_as_they_are_asked_for(tmp_path, monkeypatch):
    for value, name in enumerate(("a.png", "b.png", "c.png")):
        Image.new("L", (1, 1), value).save(tmp_path / name)
    monkeypatch.setattr(image_source, "FILES_PER_PART", 2)
    found = find_images(str(tmp_path), lambda image: torch.tensor([image.getpixel((0, 0))[0]]), batch_size=1)
    assert read(found) == [(0, ["a.png"], [[0]]), (0, ["b.png"], [[1]]), (1, ["c.png"], [[2]])]
    assert (found.todo, found.count) == ([0, 1], 3)
    some = found.only(found.parts_of([str(tmp_path / "c.png")]), [0], 1)
    assert read(some) == [(0, ["c.png"], [[2]])] and some.count == 1
    assert read(found.only(found.parts, [1], 3)) == [(1, ["c.png"], [[2]])]
    assert len(found.parts) == 2 and found.count == 3, "the source itself stays as it was"


def test_the_stamp_of_a_file_is_its_size_and_time_and_of_what_is_none_nothing(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"seven b")
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    stamp, source = FileStamp.at(path), ImageSource([], None, None, 0)
    assert stamp == FileStamp.at(str(path)) == (7, 1_700_000_000_123_456_789, "")
    assert source.stamp(str(path)) == str(stamp) == "7 1700000000123456789 ", "as indexes hold it"
    whole = FileStamp.of(path.stat(), b"seven b")
    assert whole.digest == FileStamp.digest_of(b"seven b") == hashlib.sha256(b"seven b").hexdigest()[:32]
    assert FileStamp.read(str(whole)) == whole and FileStamp.read("7") is None
    for odd in ("pipe:cat a", "https://images.example/a.tar", str(tmp_path / "gone"), "a\0b", "\ud800", "x" * 5000):
        assert FileStamp.at(odd) is None and source.stamp(odd) == ""
