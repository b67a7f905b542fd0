import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from fromage.retrieval.image_root import ImageRoot, common_root, to_bytes, to_text

PIECES = st.sampled_from(
    [b"/", b"/data", b"/photos", b"a.jpg", b"..", b"https://", b"s3://", b"pipe:", b"C:", b"0.tar#k", b"caf\xe9\n"]
)
PATHS = st.lists(st.lists(PIECES, max_size=5).map(b"".join), min_size=1, max_size=8)
ROOTS = st.sampled_from(["", "/", "/data", "/data/photos"])


@settings(deadline=None)
@given(PATHS, ROOTS, ROOTS)
def test_columns_and_single_paths_agree_and_come_back(paths, path, former):
    root, column = ImageRoot(path, former if path else ""), pa.array(paths, pa.binary())
    stored = root.stored(column)
    assert stored.to_pylist() == [root.store(each) for each in paths]
    assert root.located(stored).to_pylist() == [root.locate(each) for each in stored.to_pylist()]
    absolute = [each.startswith(b"/") for each in paths]
    back = root.located(stored).to_pylist()
    if not root.former:
        assert [b for b, a in zip(back, absolute, strict=True) if a] == [
            p for p, a in zip(paths, absolute, strict=True) if a
        ]


def test_files_are_relative_and_addresses_are_not():
    root = ImageRoot("/data/photos")
    paths = [
        b"/data/photos/a/b.jpg",
        b"/data/photos2/c.jpg",
        b"https://images.example/d.jpg",
        b"/data/photos/0.tar#k",
        b"s3://b/0.tar#k",
    ]
    stored = root.stored(pa.array(paths, pa.binary()))
    assert stored.to_pylist() == [b"a/b.jpg", paths[1], paths[2], b"0.tar#k", paths[4]]
    assert ImageRoot("/mnt").located(stored).to_pylist() == [b"/mnt/a/b.jpg", paths[1], paths[2], b"/mnt/0.tar#k", paths[4]]
    moved = ImageRoot("/mnt", "/data")
    assert moved.locate(paths[0]) == b"/mnt/photos/a/b.jpg" and moved.store(moved.locate(paths[0])) == paths[0]


def test_a_path_that_is_a_text_is_located_as_its_bytes_are():
    assert ImageRoot("/mnt").path_of("a/caf\udce9 é.jpg") == "/mnt/a/caf\udce9 é.jpg"
    assert to_bytes("caf\udce9 é") == b"caf\xe9 \xc3\xa9" and to_text(b"caf\xe9 \xc3\xa9") == "caf\udce9 é"


def test_the_common_folder():
    def of(*paths):
        return common_root([pa.array([each], pa.binary()) for each in paths])

    assert of(b"/a/b/c.jpg", b"https://images.example/x", b"/a/bd/e.jpg") == "/a"
    assert of(b"/a/b/c.jpg", b"/a/b/d/e.jpg") == "/a/b" and of(b"/a.jpg", b"/b/c.jpg") == "/"
    assert of(b"/a/0.tar#k/x", b"/a/0.tar#k/y") == "/a", "not a folder within the shard"
    assert of(b"/a/b.jpg", b"c.jpg") == of(b"https://images.example/x") == of() == ""
