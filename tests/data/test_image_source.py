"""What is kept of an image's own JSON, and of its file."""

import hashlib
import json
import os

from fromage.data.image_source import FileStamp, ImageSource, _meta, without_folders


def test_of_paths_on_the_machine_that_packed_the_name_is_left():
    packed = {"source": "/home/someone/private/a.jpg", "target_image": "/home/someone/b.jpg", "line": 3, "label": "/m/01"}
    shared = {"source": "a.jpg", "target_image": "b.jpg", "line": 3, "label": "/m/01"}
    assert without_folders(packed) == shared and json.loads(_meta(json.dumps(packed).encode())) == shared
    for untouched in ({"source": "dogs/a.jpg"}, {"source": 7}):
        assert without_folders(untouched) == untouched


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
