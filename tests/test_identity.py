"""Folders that belong to one thing: begun, taken up, and refused to another."""

import json

import pytest

from fromage.errors import UserError
from fromage.identity import FolderKind

PLAIN = FolderKind("about.json", "scores", of="model", remedy="name another")
STAMPED = FolderKind(
    "about.json",
    "rows",
    of="run",
    format=("rows", 2),
    keys=frozenset({"model"}),
    ignored=frozenset({"place"}),
    foreign="*.tar",
)


@pytest.mark.parametrize("kind", [PLAIN, STAMPED])
def test_a_folder_is_begun_and_taken_up(tmp_path, kind):
    about = {"model": "é", "shape": [1, 2]}
    begun = kind.begin(tmp_path / "out", about)
    assert begun == json.loads((tmp_path / "out" / "about.json").read_text()) and begun.items() >= about.items()
    (tmp_path / "out" / "0.tar").touch()
    assert kind.begin(tmp_path / "out", about) == kind.find(tmp_path / "out", about) == kind.read(tmp_path / "out") == begun


def test_another_is_refused_by_what_differs(tmp_path):
    PLAIN.begin(tmp_path, {"model": "a", "shape": 1})
    for about in ({"model": "b", "shape": 1}, {"shape": 1}):
        with pytest.raises(UserError, match=rf"scores of another model \(model 'a' there, {about.get('model')!r} here\)"):
            PLAIN.begin(tmp_path, about)
    with pytest.raises(UserError, match=r"extra None there, 1 here.*name another"):
        PLAIN.require(tmp_path, {"model": "a", "shape": 1, "extra": 1})


def test_what_may_differ_is_not_compared(tmp_path):
    STAMPED.begin(tmp_path, {"model": "a", "place": "here"})
    assert STAMPED.begin(tmp_path, {"model": "a", "place": "there"})["place"] == "here"


def test_something_else_is_refused(tmp_path):
    assert PLAIN.find(tmp_path, {}) is None and PLAIN.find(tmp_path / "none", {}) is None
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="something else than scores"):
        PLAIN.begin(tmp_path, {})
    assert STAMPED.find(tmp_path, {}) is None
    (tmp_path / "0.tar").touch()
    with pytest.raises(UserError, match="something else than rows"):
        STAMPED.find(tmp_path, {})
    with pytest.raises(UserError, match="something else than rows"):
        STAMPED.require_own(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        PLAIN.begin(tmp_path / "thesis.txt", {})


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "about.json"),
        ("[]", "not a JSON object"),
        ('{"format": "rows", "version": 1, "model": 1}', "another format or version"),
        ('{"format": "rows", "version": 2}', "no 'model'"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, text, cause):
    (tmp_path / "about.json").write_text(text)
    for read in (STAMPED.read, lambda folder: STAMPED.begin(folder, {"model": 1})):
        with pytest.raises(UserError, match=rf"cannot be read as rows \(about\.json.*{cause}|{cause}"):
            read(tmp_path)
