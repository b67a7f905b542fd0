"""Files of the web demo: what keeps, and what gives way."""

import os

import pytest

from fromage.apps.web import shelf
from fromage.apps.web.shelf import Shelf, shelf_at


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(shelf, "TOTAL", 1000)
    monkeypatch.setattr(shelf, "EACH", 400)
    monkeypatch.setattr(shelf, "FILES", 8)


@pytest.fixture
def folder(tmp_path):
    def put(name, size, age):
        path = tmp_path / name / "image.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
        os.utime(path, (1000 - age, 1000 - age))
        return str(path)

    put.path = tmp_path
    return put


def names(folder):
    return sorted(path.name for path in folder.path.iterdir())


def test_the_oldest_give_way_and_are_forgotten(folder):
    gone = []
    kept = Shelf(folder.path)
    kept.forget = gone.append
    files = [folder(name, 300, age) for name, age in (("b", 5), ("a", 9), ("c", 1))]
    kept.make_room(100)
    assert names(folder) == ["a", "b", "c"] and not gone
    kept.make_room(200)
    assert names(folder) == ["b", "c"] and gone == [files[1]]
    kept.make_room(1000)
    assert not names(folder) and gone == [files[1], files[0], files[2]]


def test_a_visitor_of_many_files_makes_room_for_himself(folder):
    kept = Shelf(folder.path)
    kept.uploaded("other", [folder("a", 200, 9)])
    kept.uploaded("one", [folder("b", 200, 5), folder("c", 200, 4)])
    kept.make_room(150, 150, "one")
    assert names(folder) == ["a", "c"], "the other visitor's file is older, and stays"
    kept.make_room(400, 400, "one")
    assert names(folder) == ["a"]


def test_files_are_counted_too(folder):
    for number in range(20):
        folder(f"{number:02}", 0, -number)
    Shelf(folder.path).make_room(0)
    assert names(folder) == [f"{number:02}" for number in range(12, 20)]


def test_what_the_demo_writes_itself_gives_way_too(folder, monkeypatch):
    monkeypatch.setattr(shelf, "BETWEEN", 500)
    kept = shelf_at(str(folder.path))
    assert kept is shelf_at(str(folder.path))
    for number in range(10):
        folder(f"{number:02}", 300, -number)
        kept.wrote(300)
    assert len(names(folder)) <= 5 and "09" in names(folder)
