"""An index follows its folder."""

import errno
import json
import os

import numpy as np
import pytest
from PIL import Image
from test_faiss_index import COLOURS, Model, write_colours
from test_open_index import from_elsewhere

from fromage.errors import UserError
from fromage.retrieval.build import build_index
from fromage.retrieval.open_index import load_index
from fromage.retrieval.sync import sync


def make(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 5), colour).save(path)


def never():
    pytest.fail("the model was loaded for nothing")


def same_as_new(folder, photos, out):
    """Whether the index holds what one that is built again would."""
    new, old = build_index(Model(), photos, out), load_index(folder)
    order = np.argsort([item.path for item in old.items])
    assert [old.items[int(i)].path for i in order] == [item.path for item in new.items]
    np.testing.assert_allclose(old.vectors[order], new.vectors, atol=5e-4)  # rounded to float16, where a kind is not flat
    return True


@pytest.fixture
def photos(tmp_path):
    return write_colours(tmp_path / "photos")


@pytest.fixture(params=["flat", "IVF1,Flat"])
def index(request, photos, tmp_path):
    build_index(Model(), photos, tmp_path / "index", kind=request.param)
    return tmp_path / "index"


def test_new_changed_and_deleted_images(index, photos, tmp_path):
    assert sync(index, photos, never)[1][:4] == (0, 0, 0, 3)
    make(photos / "more" / "b.png", "white")
    make(photos / "red" / "a.png", "yellow")
    (photos / "blue" / "a.png").unlink()
    (photos / "more" / "broken.jpg").write_bytes(b"no image")
    changed, done = sync(index, photos, Model)
    assert done[:4] == (1, 1, 1, 1) and "broken.jpg" in done.broken[0]
    assert str(done) == "1 new, 1 changed, 1 deleted, 1 unchanged, 1 left out" and len(changed) == 3
    (photos / "more" / "broken.jpg").unlink()
    before = (index / "index.json").read_bytes()
    assert sync(index, photos, never)[1][:4] == (0, 0, 0, 3)
    assert (index / "index.json").read_bytes() == before and same_as_new(index, photos, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "new", "photos"]


def test_a_file_that_is_no_image_is_tried_once(index, photos, tmp_path):
    for name in ("odd.jpg", "late.jpg"):
        (photos / name).write_bytes(b"no image")
    first = sync(index, photos, Model)[1]
    assert (first.new, len(first.broken)) == (0, 2)
    before = (index / "index.json").read_bytes()
    again = sync(index, photos, never)[1]
    assert sorted(again.broken) == sorted(first.broken) and again.new == 0
    assert (index / "index.json").read_bytes() == before
    make(photos / "late.jpg", "white")
    found, done = sync(index, photos, Model)
    assert (done.new, len(done.broken), len(found)) == (1, 1, 4) and "odd.jpg" in done.broken[0]
    moved = photos.rename(tmp_path / "moved")
    assert len(sync(index, moved, never)[1].broken) == 1
    (moved / "odd.jpg").unlink()
    assert sync(index, moved, never)[1].broken == []


def test_an_image_is_removed_by_any_of_its_paths(index, photos, monkeypatch):
    """As search prints it, from the current folder, and from that of the images."""
    from fromage.retrieval.build import remove

    monkeypatch.chdir(photos.parent)
    remove(index, f"{photos.name}/red/a.png")
    with pytest.raises(UserError, match=r"has no image a\.png"):
        remove(index, "a.png")
    assert [item.path for item in remove(index, "blue/a.png").items] == [str(photos / "green" / "a.png")]


def test_a_file_that_cannot_be_read_is_tried_again(index, photos, monkeypatch):
    """Its rights may change, which size and time of change do not show."""
    from fromage.data import image_source

    make(photos / "shut.png", "white")
    with monkeypatch.context() as patch:
        real = image_source.open_regular
        shut = PermissionError(13, "Permission denied")
        patch.setattr(image_source, "open_regular", lambda path: _raise(shut) if path.name == "shut.png" else real(path))
        assert "Permission denied" in sync(index, photos, Model)[1].broken[0]
    assert sync(index, photos, Model)[1][:4] == (1, 0, 0, 3)


def _raise(error):
    raise error


def test_a_file_whose_content_is_the_same_is_not_embedded_again(index, photos):
    os.utime(photos / "red" / "a.png", ns=(1, 1))
    assert sync(index, photos, never)[1][:4] == (0, 0, 0, 3)
    before = (index / "index.json").read_bytes()
    (photos / "red" / "a.png").chmod(0o600)
    assert sync(index, photos, never)[1].unchanged == 3 and (index / "index.json").read_bytes() == before


def test_captions_are_taken_over(index, photos, tmp_path):
    (tmp_path / "captions.json").write_text('{"red/a.png": "a red one ", "green/a.png": "a green one"}')
    found, done = sync(index, photos, never, captions=tmp_path / "captions.json")
    assert done[:4] == (0, 0, 0, 3) and sorted(item.caption for item in found.items) == ["", "a green one", "a red one"]
    before = (index / "index.json").read_bytes()
    sync(index, photos, never, captions=tmp_path / "captions.json")
    assert (index / "index.json").read_bytes() == before


def test_an_image_that_was_edited_keeps_its_caption_where_none_is_given(index, photos, tmp_path):
    (tmp_path / "captions.json").write_text('{"red/a.png": "a red one", "green/a.png": "a green one"}')
    sync(index, photos, never, captions=tmp_path / "captions.json")
    captions = lambda found: {item.path.split("/")[-2]: item.caption for item in found.items}  # noqa: E731
    for colour, given, wanted in (("yellow", None, "a red one"), ("white", {"red/a.png": "was red"}, "was red")):
        make(photos / "red" / "a.png", colour)
        if given:
            (tmp_path / "captions.json").write_text(json.dumps(given))
        found, done = sync(index, photos, Model, captions=tmp_path / "captions.json" if given else None)
        assert done.changed == 1 and captions(found) == {"red": wanted, "green": "a green one", "blue": ""}


def test_a_folder_that_was_moved_is_where_the_images_are_from_then_on(index, photos, tmp_path):
    moved = photos.rename(tmp_path / "moved")
    from_elsewhere(index)
    assert sync(index, moved, never)[1][:4] == (0, 0, 0, 3)
    found = load_index(index)
    assert found.place.own and found.root.path == str(moved) and not found.missing().gone
    make(moved / "b.png", "white")
    assert sync(index, moved, Model)[1][:4] == (1, 0, 0, 3) and same_as_new(index, moved, tmp_path / "new")


@pytest.mark.parametrize("given", [None, "mine.ckpt"])
def test_the_checkpoint_that_a_stranger_named_is_not_sealed(index, photos, tmp_path, given):
    (tmp_path / "mine.ckpt").touch()
    known = str(tmp_path / given) if given else ""
    from_elsewhere(index, checkpoint="stranger/model")
    sync(index, photos, never, checkpoint=tmp_path / given if given else None)
    found = load_index(index)
    assert found.place.own and found.checkpoint == known
    sync(index, photos, never)
    assert load_index(index).checkpoint == known, "one's own stays"


def test_a_part_of_the_folder_and_one_around_it(index, photos, tmp_path):
    make(photos / "red" / "b.png", "white")
    make(photos / "green" / "b.png", "white")
    assert sync(index, photos / "red", Model)[1][:4] == (1, 0, 0, 1)
    assert len(load_index(index)) == 4 and load_index(index).root.path == str(photos)
    make(tmp_path / "around.png", "yellow")
    folder = index.rename(tmp_path.parent / f"{tmp_path.name}.index")
    assert sync(folder, tmp_path, Model)[1][:4] == (2, 0, 0, 4)
    assert load_index(folder).root.path == str(tmp_path)


def test_another_folder_is_refused_before_it_takes_everything_away(index, photos, tmp_path):
    make(tmp_path / "others" / "x.png", "red")
    (tmp_path / "empty").mkdir()
    for folder, named in (
        (tmp_path / "others", "none of its images"),
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "no", "no folder"),
    ):
        with pytest.raises(UserError, match=named):
            sync(index, folder, never)
    assert len(load_index(index)) == 3


@pytest.mark.parametrize("when", ["embedding", "writing"])
def test_a_sync_that_was_killed_may_be_repeated(index, photos, tmp_path, monkeypatch, when):
    for i in range(4):
        make(photos / f"new{i}.png", (50 * i, 0, 9))
    monkeypatch.setattr("fromage.data.image_source.FILES_PER_PART", 1)
    calls, embed = [], Model.embed_images

    def counted(self, features):
        calls.append(len(features))
        if when == "embedding" and len(calls) == 3:
            raise KeyboardInterrupt
        return embed(self, features)

    monkeypatch.setattr(Model, "embed_images", counted)
    with monkeypatch.context() as patch:
        if when == "writing":
            patch.setattr("fromage.retrieval.faiss_index.write_rows", lambda *args: 1 / 0)
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            sync(index, photos, Model)
    assert len(load_index(index)) == 3, "as it was"
    make(photos / "late.png", "white")
    (photos / "new0.png").unlink()
    calls[:] = [0] * 9
    assert sync(index, photos, Model)[1][:4] == (4, 0, 0, 3)
    assert sum(calls) == (3 if when == "embedding" else 1), "what was embedded is not embedded again"
    monkeypatch.undo()
    assert same_as_new(index, photos, tmp_path / "new")


def test_an_index_of_a_former_version_without_stamps_is_embedded_once_more(index, photos):
    from fromage.data.image_source import Item
    from fromage.retrieval.faiss_index import FaissIndex

    old = load_index(index)
    FaissIndex.build(old.vectors, [Item(item.path, item.caption) for item in old.items], "f00d").save(index, overwrite=True)
    from_elsewhere(index)
    assert sync(index, photos, Model)[1][:4] == (0, 3, 0, 0)
    assert sync(index, photos, never)[1][:4] == (0, 0, 0, 3) and len(COLOURS) == 3


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (errno.EIO, r"photos/red: cannot be looked into \(Input/output error\)"),
        (errno.EACCES, r"photos/red/\w+\.\w+: its folder cannot be listed"),
    ],
)
@pytest.mark.filterwarnings("ignore:folders that may not be listed")
def test_a_folder_that_cannot_be_listed_takes_no_image_away(index, photos, monkeypatch, cause, told):
    before, real = (index / "index.json").read_bytes(), os.scandir

    def fails(path="."):
        return _raise(OSError(cause, os.strerror(cause), str(path))) if str(path).endswith("red") else real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fails)
        with pytest.raises(UserError, match=told):
            sync(index, photos, never)
    assert (index / "index.json").read_bytes() == before
