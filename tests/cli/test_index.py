"""The index's verbs, one after the other, as a user runs them."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_faiss_index import COLOURS, Model, rows, write_colours

from fromage.cli.main import main
from fromage.data.image_source import Item
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.open_index import load_index
from fromage.retrieval.results import load_images

HIT = {"rank", "score", "path", "name", "key", "caption", "metadata"}


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A checkpoint of the model of three colours."""
    for module in ("models.fromage", "retrieval.open_index"):
        monkeypatch.setattr(f"fromage.{module}.load_model", lambda path, device="cpu", **options: Model())
    (tmp_path / "a.ckpt").touch()
    return str(tmp_path / "a.ckpt")


def test_every_stage(ckpt, tmp_path, capsys):
    images, at = write_colours(tmp_path / "images"), lambda name: str(tmp_path / name)
    red, blue = (str(images / name / "a.png") for name in ("red", "blue"))
    some = ["--ckpt", ckpt, "--images", str(images)]
    assert main(["index", "embed", *some, "--out", at("all"), "--dtype", "float16", "--workers", "0"]) == 0
    assert main(["index", "embed", "--ckpt", ckpt, "--images", str(images / "red"), "--out", at("red")]) == 0
    assert main(["index", "build", "--embeddings", at("red"), "--out", at("index")]) == 0
    assert main(["index", "add", at("index"), "--embeddings", at("all")]) == 0
    assert load_index(at("index"), "f00d").items[0].path == red
    assert main(["index", "build", *some, "--out", at("other"), "--kind", "IVF1,Flat"]) == 0
    assert main(["index", "remove", at("other"), blue]) == 0
    assert main(["index", "merge", at("other"), at("index"), "--out", at("merged")]) == 0
    capsys.readouterr()
    assert main(["index", "info", at("merged"), "--check"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("count              3", "IVF1,Flat", "nprobe=1", "10  not measured", "every byte"))

    words = ["blue", "green", "--index", at("merged"), "-k", "2", "--png", at("found.png"), "--overwrite"]
    assert main(["search", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "blue" and blue in lines[1] and lines[3] == "green" and lines[6] == f"drawn: {at('found.png')}"
    assert Image.open(at("found.png")).format == "PNG"
    (images / "blue" / "a.png").unlink()
    assert main(["search", *words, "--overwrite"]) == 0
    assert f"warning: left out #1: {blue}" in capsys.readouterr().err


def test_image_and_words_are_one_query_and_images_alone_are_one_each(ckpt, tmp_path, capsys):
    images, index = write_colours(tmp_path / "images"), str(tmp_path / "index")
    red, blue, green = (str(images / name / "a.png") for name in ("red", "blue", "green"))
    assert main(["index", "build", "--ckpt", ckpt, "--images", str(images), "--out", index]) == 0
    capsys.readouterr()
    found = lambda *words: [json.loads(line) for line in said(capsys, "search", *words, "--json", "--index", index)]  # noqa: E731
    (one,) = found("blue", "--image", red, "-k", "3")
    assert one["query"] == f"@{red} blue" and {hit["path"] for hit in one["hits"][:2]} == {red, blue}
    assert [hit["path"] for hit in one["hits"]][2] == green and one["hits"][0].keys() == HIT
    assert [one["hits"][0]["path"] for one in found("--image", red, "--image", green)] == [red, green]
    assert [one["query"] for one in found("red", "blue")] == ["red", "blue"]


def test_a_search_is_filtered_by_metadata(ckpt, tmp_path, capsys):
    images, index = write_colours(tmp_path / "images"), str(tmp_path / "index")
    (tmp_path / "t.jsonl").write_text("".join(f'{{"file": "{name}/a.png", "letters": {len(name)}}}\n' for name in COLOURS))
    table = ["--table", str(tmp_path / "t.jsonl"), "--key", "file"]
    assert main(["index", "build", "--ckpt", ckpt, "--images", str(images), "--out", index, *table]) == 0
    assert "1 column of metadata" in capsys.readouterr().out
    (line,) = said(capsys, "search", "red", "--index", index, "--json", "--where", "letters >= 4")
    hits = json.loads(line)["hits"]
    assert sorted(hit["metadata"]["letters"] for hit in hits) == [4, 5]
    assert {Path(hit["path"]).parent.name for hit in hits} == {"blue", "green"}
    png = ["--png", str(tmp_path / "found.png")]
    assert len(said(capsys, "search", "red", "--index", index, "--where", "letters = 3", *png)) == 3
    assert main(["search", "red", "--index", index, "--where", "letters > 9"]) == 0
    assert capsys.readouterr().err == "warning: no image of the index fits letters > 9\n"
    for where in ("letter = 1", "letters = 'x'", "letters = (select 1)"):
        assert main(["search", "red", "--index", index, "--where", where]) == 2
        err = capsys.readouterr().err
        assert err.startswith("fromage: where: ") and err.count("\n") == 1


def said(capsys, *words):
    assert main([*words]) == 0
    return capsys.readouterr().out.splitlines()


def test_json_is_printed_alone_or_written_beside_the_text(ckpt, tmp_path, capsys):
    images, index = write_colours(tmp_path / "images"), str(tmp_path / "index")
    (line,) = said(capsys, "index", "build", "--ckpt", ckpt, "--images", str(images), "--out", index, "--json")
    assert (json.loads(line)["count"], json.loads(line)["out"]) == (3, index)
    (line,) = said(capsys, "index", "info", index, "--json")
    assert (json.loads(line)["count"], json.loads(line)["kind"]) == (3, "flat")
    files = tmp_path / "new" / "a.json", tmp_path / "b.json"
    assert "count              3" in said(capsys, "index", "info", index, "--json", str(files[0]))
    assert json.loads(files[0].read_text()) == json.loads(line)
    assert "red" in said(capsys, "search", "red", "blue", "--index", index, "--json", str(files[1]))
    assert [json.loads(line)["query"] for line in files[1].read_text().splitlines()] == ["red", "blue"]


def test_the_authors_embeddings(ckpt, tmp_path, capsys):
    urls = [f"https://images.example/{name}.jpg" for name in COLOURS]
    path = tmp_path / "cc3m_embeddings.pkl"
    path.write_bytes(pickle.dumps({"paths": urls, "embeddings": rows(3, q=3)}))
    assert main(["index", "import", str(path), "--ckpt", ckpt, "--out", str(tmp_path / "index")]) == 0
    assert [item.path for item in load_index(tmp_path / "index", "f00d").items] == urls


def test_the_checkpoint_of_an_import_may_be_a_name_on_the_hub(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "e.pkl"
    path.write_bytes(pickle.dumps({"paths": ["https://images.example/a.jpg"], "embeddings": rows(1, q=3)}))
    for name, found in (("someone/fromage", "someone/fromage"), ("a.ckpt", ckpt)):
        assert main(["index", "import", str(path), "--ckpt", name, "--out", str(tmp_path / "index"), "--overwrite"]) == 0
        assert load_index(tmp_path / "index", "f00d").checkpoint == found


def test_what_a_stranger_named_is_printed_without_control_characters(ckpt, tmp_path):
    """In a process of its own: its standard output refuses what is not Unicode."""
    items = [Item(b"r\xff.png".decode("utf-8", "surrogateescape"), "a \x1b]0;title\a star")]
    FaissIndex.build(rows(1, q=3), items, "f00d", ckpt).save(tmp_path / "index")
    program = (
        "import fromage.retrieval.open_index, test_faiss_index; from fromage.cli.main import main\n"
        "fromage.retrieval.open_index.load_model = lambda path, device, **options: test_faiss_index.Model()\n"
        f"main(['search', 'blue', '--index', {str(tmp_path / 'index')!r}])"
    )
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "retrieval"), "PYTHONIOENCODING": "utf-8:strict"}
    said = subprocess.run([sys.executable, "-c", program], env=where, capture_output=True, check=True).stdout.decode()
    assert "r\N{REPLACEMENT CHARACTER}.png" in said and "star" in said and "\x1b" not in said


def test_numbers_that_make_no_sense_are_refused(ckpt, tmp_path, capsys):
    images = write_colours(tmp_path / "images")
    some = ["index", "embed", "--ckpt", ckpt, "--images", str(images), "--out", str(tmp_path / "out")]
    for words in (
        [*some, "--batch-size", "0"],
        [*some, "--workers", "-1"],
        ["search", "blue", "-k", "-1"],
    ):
        assert main(words) == 2
        assert words[-2] in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_wrong_is_one_line(ckpt, tmp_path, capsys):
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "index.json").touch()
    index = str(tmp_path / "i")
    out = ["--out", str(tmp_path / "out")]
    for words, named in (
        (["index", "build", *out], "--embeddings"),
        (["index", "build", *out, "--images", str(tmp_path)], "--ckpt"),
        (["index", "build", *out, "--images", str(tmp_path), "--ckpt", ckpt, "--embeddings", str(tmp_path)], "either"),
        (["index", "build", *out, "--images", "nowhere", "--ckpt", ckpt], "nowhere: no such folder"),
        (["index", "build", *out, "--embeddings", str(tmp_path)], "fromage index embed"),
        (["index", "build", *out, "--embeddings", str(tmp_path), "--images", "s/*.tar"], "either"),
        (["index", "build", *out, "--embeddings", str(tmp_path), "--captions", ckpt], "either"),
        (["index", "build", "--embeddings", str(tmp_path), "--out", f"{ckpt}/out"], "no folder that can be written to"),
        (["search", "blue", "--png", str(tmp_path / "x.jpg")], "ends in .png"),
        (["index", "merge", str(tmp_path), *out], "cannot be read as an index"),
        (["index", "info", str(tmp_path)], "cannot be read as an index"),
        (["search", "--index", index], "--image"),
        (["search", "--index", index, "--image", "gone.jpg"], "gone.jpg: no such file"),
        (["search", "a", "--index", index, "--imgae", "b"], "did you mean --image?"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_index_moves_and_follows_its_images(ckpt, tmp_path, capsys):
    images, index, page = write_colours(tmp_path / "images"), str(tmp_path / "index"), tmp_path / "found.png"
    assert main(["index", "build", "--ckpt", ckpt, "--images", str(images), "--out", index]) == 0
    moved = images.rename(tmp_path / "moved")
    capsys.readouterr()
    words = ["search", "red", "--index", index, "-k", "1", "--png", str(page)]
    assert main(words) == 2 and not page.exists(), "nothing drawn is no success"
    said = capsys.readouterr().err
    assert "3 of 3 images are missing" in said and "nothing is drawn" in said and "--images" in said
    assert main([*words, "--images", str(moved)]) == 0 and page.exists()
    assert str(moved / "red" / "a.png") in capsys.readouterr().out
    assert main(["index", "info", index, "--images", str(moved)]) == 0
    out, err = capsys.readouterr()
    assert f"root               {moved}" in out and "built_here         yes" in out and not err
    (moved / "red" / "a.png").rename(moved / "red" / "b.png")
    (moved / "blue" / "a.png").write_bytes(b"no image")
    assert main(["index", "sync", index, "--images", str(moved)]) == 0
    out, err = capsys.readouterr()
    assert "1 new, 0 changed, 1 deleted, 1 unchanged, 1 left out" in out and "blue/a.png" in err
    assert main(["index", "sync", index, "--images", str(tmp_path / "no")]) == 2
    assert main(["chat", "--index", index, "--images", "3"]) == 2 and "3: no such folder" in capsys.readouterr().err


def test_a_pickle_from_elsewhere_names_no_file_of_this_machine(ckpt, tmp_path, capsys):
    private = tmp_path / "home" / "private.png"
    photos = write_colours(tmp_path / "photos")
    private.parent.mkdir()
    Image.new("RGB", (8, 8)).save(private)
    (photos / "link.png").symlink_to(private)
    paths = [str(private), "../home/private.png", "link.png", "red/a.png"]
    (tmp_path / "e.pkl").write_bytes(pickle.dumps({"paths": paths, "embeddings": rows(4, q=3)}))
    run = ["index", "import", str(tmp_path / "e.pkl"), "--ckpt", ckpt, "--out", str(tmp_path / "index"), "--overwrite"]
    for more, opened in ([], []), (["--images", str(photos)], [str(photos / "red" / "a.png")]):
        assert main([*run, *more]) == 0
        assert "lie outside their folder" in capsys.readouterr().err
        index = load_index(tmp_path / "index")
        hits = index.search(rows(1, q=3), 9)[0]
        assert len(hits) == 4 and [hit.path for hit, _ in load_images(hits, 9)[0]] == opened
