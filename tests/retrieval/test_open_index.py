"""Indexes that travel, and those from elsewhere: which of their images are opened, and what of them is believed."""

import json
import os
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image
from test_build import store
from test_codec import encoded, make_tar
from test_faiss_index import COLOURS, Model, items, rows, write_colours

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.retrieval import open_index
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.build import add, build, build_index, merge, trust
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.image_root import ImageAccess, ImageRoot
from fromage.retrieval.index_folder import ABOUT
from fromage.retrieval.item_table import ItemTable
from fromage.retrieval.open_index import load_index, search_index
from fromage.retrieval.results import load_images
from fromage.serving.image_ids import Gone, ImageIds

EYE = np.eye(3, dtype=np.float32)


@pytest.fixture
def photos(tmp_path):
    return write_colours(tmp_path / "photos")


@pytest.fixture
def index(photos, tmp_path):
    """The folder of an index of three images."""
    build_index(Model(), photos, tmp_path / "index", checkpoint="a.ckpt")
    return tmp_path / "index"


def from_elsewhere(folder, **change):
    """Make an index one that another machine built."""
    about = json.loads((folder / ABOUT).read_text()) | change
    about.pop("built_here", None)
    (folder / ABOUT).write_text(json.dumps(about))
    return folder


def opened(index):
    """How many of its images can be opened: as hits, and by their ids, which must be the same ones."""
    hits = index.search(EYE, 99)[0]
    shown, lost = load_images(hits, len(hits))
    ids, by_id = ImageIds(index), []
    for hit in hits:
        try:
            by_id.append(ids.open(ids.of(hit.path)).size)
        except Gone as error:
            assert "/" not in str(error)
    assert len(by_id) == len(shown) and len(shown) + len(lost) == len(hits)
    return len(shown)


# --- an index travels -----------------------------------------------------------------------------------------------------


def test_paths_are_stored_relative_to_the_folder_given_and_shown_absolute(index, photos):
    about = json.loads((index / ABOUT).read_text())
    assert about["root"] == str(photos)
    assert [item.path for item in ItemTable.open(index / "items.arrow")] == [f"{name}/a.png" for name in sorted(COLOURS)]
    loaded = load_index(index)
    assert [item.path for item in loaded.items] == [str(photos / name / "a.png") for name in sorted(COLOURS)]
    assert opened(loaded) == 3 and loaded.missing().gone == []


def test_moved_images_are_counted_and_found_at_their_new_root(index, photos, tmp_path):
    moved = photos.rename(tmp_path / "moved")
    assert len(load_index(index).missing().gone) == 3 and opened(load_index(index)) == 0
    loaded = load_index(index, images=moved)
    assert loaded.search(EYE[2:], 1)[0][0].path == str(moved / "blue" / "a.png")
    assert opened(loaded) == 3 and not loaded.missing().gone
    with pytest.raises(UserError, match="is no folder"):
        load_index(index, images=tmp_path / "none")


def test_the_root_is_the_common_folder_where_none_is_given(photos, tmp_path):
    paths = [str(photos / name / "a.png") for name in COLOURS]
    FaissIndex.build(EYE, [Item(path) for path in paths], "f00d").save(tmp_path / "index")
    assert load_index(tmp_path / "index").root.path == str(photos)
    assert [item.path for item in load_index(tmp_path / "index").items] == paths
    urls = ["https://images.example/a.jpg", *paths[1:]]
    FaissIndex.build(EYE, [Item(path) for path in urls], "f00d").save(tmp_path / "index", overwrite=True)
    assert next(item.path for item in load_index(tmp_path / "index", images=tmp_path).items) == urls[0]


def test_an_index_of_absolute_paths_is_read_and_moved_too(photos, tmp_path):
    """As version 2 wrote it: no root, no seal."""
    place = ImageAccess(ImageRoot(""))
    paths = [f"/gone/{name}/a.png" for name in sorted(COLOURS)]
    FaissIndex(EYE[::-1].copy(), FaissIndex.build(EYE, [Item(p) for p in paths], "f00d").items, "f00d", place=place).save(
        tmp_path / "index"
    )
    about = json.loads((tmp_path / "index" / ABOUT).read_text())
    table = [item.path for item in ItemTable.open(tmp_path / "index" / "items.arrow", ImageRoot("/gone"))]
    assert table == paths
    moved = load_index(tmp_path / "index", images=photos)
    assert opened(moved) == 3 and about["root"] == "/gone"


def test_what_is_added_from_another_folder_widens_the_root(index, photos, tmp_path):
    other = write_colours(tmp_path / "others")
    things = [Item(str(other / "red" / "a.png"))]
    about = {"checkpoint": "", "source": "x", "width": 3, "dtype": "float32", "parts": 1, "root": str(other)}
    from fromage.retrieval.embedding_store import EmbeddingStore

    made = EmbeddingStore.begin(tmp_path / "store", fingerprint="f00d", **about)
    made.write(0, EYE[:1], things, [])
    both = add(index, made)
    assert both.root.path == str(tmp_path) and len(both) == 4 and opened(load_index(index)) == 4
    joined = merge([index], tmp_path / "merged")
    assert joined.root.path == str(tmp_path) and opened(load_index(tmp_path / "merged")) == 4


# --- an index from elsewhere ----------------------------------------------------------------------------------------------


def test_images_of_an_index_from_elsewhere_are_opened_where_the_user_says(index, photos):
    from_elsewhere(index)
    assert opened(load_index(index)) == 0 and len(load_index(index).missing().outside) == 3
    assert opened(load_index(index, images=photos)) == 3
    trust(index)
    assert opened(load_index(index)) == 3


def test_neither_a_root_nor_a_path_nor_a_link_leads_out(photos, tmp_path):
    """A stranger's index names private files in every way there is."""
    private = tmp_path / "home" / "private.png"
    private.parent.mkdir()
    Image.new("RGB", (8, 8)).save(private)
    index = tmp_path / "stranger"
    with_shard = tmp_path / "home" / "0.tar"
    import tarfile

    with tarfile.open(with_shard, "w") as tar:
        tar.add(private, "k.png")
    names = [str(private), "../home/private.png", "link.png", "folder/private.png", f"{with_shard}#k", "../home/0.tar#k"]
    for root in ("", str(tmp_path / "home"), "/", str(photos)):
        made = FaissIndex.build(rows(6, q=3), [Item(name) for name in names], "f00d")
        made.place = ImageAccess(ImageRoot(root))
        made.save(index, overwrite=True)
        (index / "link.png").symlink_to(private)
        from_elsewhere(index, root=root)
        assert opened(load_index(index)) == 0
        (index / "link.png").unlink()
    (photos / "link.png").symlink_to(private)
    (photos / "folder").symlink_to(private.parent)
    assert opened(load_index(index, images=photos)) == 0, "the folder came with the index, links and all"


def test_images_beside_its_files_belong_to_it(tmp_path):
    """A folder that holds both index and images may come from anywhere."""
    made = FaissIndex.build(EYE, [Item(f"{name}/a.png") for name in COLOURS], "f00d")
    made.save(tmp_path / "index")
    write_colours(tmp_path / "index")
    from_elsewhere(tmp_path / "index", root=str(tmp_path / "index"))
    assert opened(load_index(tmp_path / "index")) == 3


def test_special_files_are_not_opened(tmp_path):
    """A pipe would hold a thread for ever, a device its memory."""
    folder = tmp_path / "images"
    folder.mkdir()
    os.mkfifo(folder / "a.png")
    (folder / "b.png").symlink_to("/dev/zero")
    (folder / "c.png").mkdir()
    made = FaissIndex.build(EYE, [Item(str(folder / f"{name}.png")) for name in "abc"], "f00d")
    assert opened(made) == 0
    os.mkfifo(folder / "0.tar")
    assert opened(FaissIndex.build(EYE[:1], [Item(f"{folder}/0.tar#k")], "f00d")) == 0


def test_a_change_of_a_sealed_index_is_noticed(index, tmp_path):
    large = [Item(f"/photos/{'x' * 100}{i}.jpg") for i in range(60_000)]
    FaissIndex.build(rows(60_000, q=1), large, "f00d").save(tmp_path / "large")
    path = tmp_path / "large" / "items.arrow"
    data = bytearray(path.read_bytes())
    assert len(data) > 6 << 20, "spot digests do not see all of it"
    at = data.index(b"x.jpg".replace(b"x", b"x3")) if b"x3.jpg" in data else len(data) // 2
    data[at : at + 1] = b"y"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"items\.arrow: is missing or damaged"):
        load_index(tmp_path / "large")
    from_elsewhere(index, checkpoint="other.ckpt")
    assert not load_index(index).place.own


def test_what_an_untrusted_part_makes_is_not_trusted(index, photos, tmp_path):
    private = [Item("/home/private.png")]
    build(store(tmp_path / "own", EYE[:1], private), tmp_path / "a")
    assert load_index(tmp_path / "a").place.own
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
        strange = store(tmp_path / "strange", EYE[:1], private)
    build(strange, tmp_path / "b")
    add(index, strange)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not any(load_index(folder).place.own for folder in (tmp_path / "b", index, tmp_path / "c"))


def test_the_faiss_file_of_an_index_from_elsewhere_is_not_read(tmp_path, monkeypatch):
    folder, some, queries = tmp_path / "index", rows(200, q=8), rows(5, q=8, seed=1)
    build(store(tmp_path / "store", some, items(200)), folder, "IVF4,Flat")
    true = FaissIndex.build(some, items(200), "f00d").search(queries, 5)
    from_elsewhere(folder)
    with monkeypatch.context() as patch:
        patch.setattr("fromage.retrieval.ann.faiss.read_index", lambda *args: pytest.fail("FAISS believes what it reads"))
        with pytest.warns(UserWarning, match="fromage index trust"):
            strange = load_index(folder)
        for hits, known in zip(strange.search(queries, 5), true, strict=True):
            assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in known], abs=1e-3)
            assert {hit.within for hit in hits} == {str(folder)}
        assert strange.kind == "IVF4,Flat" and strange.exact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed = load_index(folder).remove(folder, "3.jpg")
    assert changed.candidates.index.ntotal == 199, "made again, of the rows"
    assert trust(folder).candidates.index.ntotal == 199 and load_index(folder).place.own


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0},
        {"width": "3"},
        {"count": None},
        {"files": {"../x": {"bytes": 1, "spot": "", "sha256": ""}}},
        {"files": {"items.arrow": 3}},
        {"root": "photos"},
        {"root": 3},
        {"root": "/a\0b"},
        {"kind": 3},
        {"version": [2]},
        {"columns": 3},
        {"columns": {"x": [1]}},
        {"checkpoint": "x" * 5000},
        {"fingerprint": "../../x"},
        {"root": "/x\ud800"},
        {"files": {"x" * 300: {"bytes": 1, "spot": "", "sha256": ""}}},
    ],
)
def test_an_index_json_that_makes_no_sense_is_one_line(index, change):
    from_elsewhere(index, **change)
    with pytest.raises(UserError, match=r"index\.json"):
        load_index(index)


def test_numbers_that_are_none_are_found_last_or_never(index, photos):
    vectors = np.array([[np.nan] * 3, [0, 1, 0], [np.inf] * 3], np.float32)
    vectors.tofile(index / "vectors.f32")
    from fromage.retrieval.index_folder import write_about

    about = json.loads((index / ABOUT).read_text())
    write_about(
        index, {name: value for name, value in about.items() if name not in ("format", "version", "files", "built_here")}
    )
    hits = load_index(index).search(EYE[1:2], 3)[0]
    assert hits[0].row == 1 and all(hit.score == -1 for hit in hits[1:])


def test_trust_says_where_it_cannot_be_kept(index, photos, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_STATE_HOME"):
        trust(index)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    moved = photos.rename(tmp_path / "moved")
    trust(index, moved)
    assert opened(load_index(index)) == 3 and load_index(index).root.path == str(moved)


# --- searching by what users have -----------------------------------------------------------------------------------------


def test_a_text_or_an_image_alone_is_one_query(index, photos):
    model, loaded = Model(), load_index(index)
    with pytest.raises(UserError, match="without its model"):
        loaded.search("red")
    assert [[hit.caption for hit in hits] for hits in search_index(model, loaded, "red", 2)] == [["", ""]]
    loaded.model = model
    one = loaded.search("red", 2)
    assert [hit.name for hit in one] == ["a.png", "a.png"] and one[0].path == str(photos / "red" / "a.png")
    assert loaded.search(["red"], 2) == [one] == search_index(model, loaded, ["red"], 2)
    blue = photos / "blue" / "a.png"
    assert loaded.search(blue, 1)[0].path == str(blue) == loaded.search(Image.open(blue), 1)[0].path
    assert [hits[0].path for hits in loaded.search([blue, "red", ["green"]], 1)] == [
        str(photos / name / "a.png") for name in ("blue", "red", "green")
    ]
    assert loaded.search([]) == [] and len(loaded.search(EYE)) == 3 == len(loaded.search(EYE.tolist()))
    assert loaded.search("red", 3, exclude=str(photos / "red" / "a.png"))[0].path != str(photos / "red" / "a.png")


def test_an_index_from_a_folder_is_made_once_and_opened_then(photos, tmp_path, monkeypatch):
    made = ImageIndex.from_folder(photos, Model(), tmp_path / "index")
    assert made.search("red", 1)[0].path == str(photos / "red" / "a.png")
    in_memory = ImageIndex.from_folder(photos, Model())
    assert in_memory.search("red", 3) == made.search("red", 3) and sorted(p.name for p in tmp_path.iterdir()) == [
        "index",
        "photos",
    ]
    monkeypatch.setattr(Model, "embed_images", lambda *args: pytest.fail("embedded again"))
    assert len(ImageIndex.from_folder(photos, Model(), tmp_path / "index")) == 3
    assert len(ImageIndex.from_folder(tmp_path / "index", Model())) == 3
    moved = photos.rename(tmp_path / "moved")
    assert opened(ImageIndex.from_folder(moved, Model(), tmp_path / "index")) == 3
    monkeypatch.setattr(Model, "fingerprint", lambda self: "beef")
    with pytest.raises(UserError, match="not with beef"):
        ImageIndex.from_folder(moved, Model(), tmp_path / "index")
    shutil.rmtree(tmp_path / "index")


def test_an_index_of_shards_is_opened_again_by_the_same_call(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    make_tar(shards / "0.tar", {"a.png": encoded(Image.new("RGB", (8, 8), "red"))})
    for source in (shards / "0.tar", shards / "*.tar", shards / "{0..0}.tar"):
        found = ImageIndex.from_folder(source, Model(), tmp_path / "index")
        assert [item.path for item in found.items] == [f"{shards}/0.tar#a"] and opened(found) == 1
    with pytest.raises(UserError, match="is no folder"):
        ImageIndex.from_folder(tmp_path / "lost", Model(), tmp_path / "index")


def test_a_stranger_s_index_does_not_choose_what_is_fetched(tmp_path):
    for known in ("stranger/model", "folder"):
        with pytest.raises(UserError, match=f"give --ckpt {known}"):
            open_index._checkpoint(tmp_path, known, None, own=False)
        assert open_index._checkpoint(tmp_path, known, None, own=True) == known
        assert open_index._checkpoint(tmp_path, known, "mine", own=False) == "mine"
