import json
import time
import warnings
from itertools import count

import pytest
from PIL import Image
from test_faiss_index import COLOURS, write_colours

from fromage.errors import UserError
from fromage.images.open import open_image
from fromage.retrieval.results import NOTED, Hit, draw_hits, left_out, load_images


def hits(folder, names):
    return [Hit(i, 1 - i / 10, str(folder / name / "a.png"), name) for i, name in enumerate(names, 1)]


def test_the_next_best_takes_the_place_of_an_image_that_is_gone(tmp_path):
    found = hits(write_colours(tmp_path), ["gone", "red", "lost", "blue", "green"])
    opened, lost = load_images(found, 2)
    notes = left_out(lost)
    assert [hit.caption for hit, _ in opened] == ["red", "blue"]
    assert [image.getpixel((0, 0)) for _, image in opened] == [COLOURS["red"], COLOURS["blue"]]
    assert [note.split(":")[0] for note in notes] == ["left out #1", "left out #3"] and "gone" in notes[0]
    assert load_images(found, 9)[0][-1][0].caption == "green"
    assert load_images(found, 0) == load_images([], 3) == ([], [])


def test_a_dead_address_is_a_note(tmp_path, monkeypatch):
    def fetch(url):
        raise UserError(f"{url}: answers 404")

    monkeypatch.setattr("fromage.images.fetch.fetch_image", fetch)
    dead = Hit(1, 0.9, "https://images.example/a.jpg", "")
    opened, lost = load_images([dead, *hits(write_colours(tmp_path), ["red"])], 1)
    assert opened[0][0].caption == "red" and lost[0][0] is dead and "404" in left_out(lost)[0]
    with pytest.raises(UserError, match="404"):
        open_image(dead.path)


def test_it_is_searched_on_however_many_have_gone(tmp_path):
    found = hits(write_colours(tmp_path), [*map(str, range(50)), "red", "blue", "green"])
    opened, lost = load_images(iter(found), 2, side=1)
    assert [hit.caption for hit, _ in opened] == ["red", "blue"] and opened[0][1].size == (1, 1)
    assert [hit for hit, _ in lost] == found[:50]
    assert len(left_out(lost)) == NOTED + 1 and left_out(lost)[-1] == f"left out {50 - NOTED} more"


def test_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("fromage.retrieval.results.SECONDS", 0.05)
    gone = (Hit(rank, 0.5, str(tmp_path / "gone.png"), "") for rank in count(1))
    monkeypatch.setattr("fromage.retrieval.results.open_image", lambda *where: time.sleep(0.02) or open_image(*where))
    opened, lost = load_images(gone, 1)
    assert not opened and lost


def test_hits_are_drawn(tmp_path):
    found = hits(write_colours(tmp_path), ["red", "blue"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = draw_hits(["one", "two"], [load_images(found, 1)[0], []])
    colours = {colour for _, colour in page.getcolors(1 << 20)}
    assert COLOURS["red"] in colours and COLOURS["blue"] not in colours
    assert isinstance(page, Image.Image)


def test_hits_carry_file_name_and_key():
    hit = Hit(1, 0.5, "/shards/00000.tar#a/k1", "")
    assert (hit.name, hit.key, hit.label) == ("00000.tar#a/k1", "a/k1", "00000.tar#a/k1")
    assert hit._replace(caption="a star").label == "a star"


def test_hits_carry_metadata_that_json_can_say():
    meta = '{"id": 7, "text": "a\\ud800", "score": NaN, "deep": ' + "[" * 100 + "]" * 100 + "}"
    hit = Hit(1, 0.5, "/p/a.jpg", "", meta=meta)
    assert hit.metadata["id"] == 7 and hit.metadata["text"] == "a?" and hit.metadata["score"] is None
    json.dumps(hit.as_dict(), allow_nan=False).encode()
    assert hit.as_dict().keys() == {"rank", "score", "path", "name", "key", "caption", "metadata"}
    for odd in ("", "[]", "{", "3", "[" * 100_000):
        assert Hit(1, 0.5, "/p/a.jpg", "", meta=odd).metadata == {}


def test_a_hit_without_a_caption_shows_its_file_name(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("fromage.retrieval.results.contact_sheet", drawn.append)
    image = Image.new("RGB", (4, 4))
    draw_hits(["red"], [[(Hit(1, 0.5, "/p/a.jpg", ""), image), (Hit(2, 0.5, "/p/b.jpg", "a star"), image)]])
    assert [text for _, text in drawn[0][0][1]] == ["#1 0.500\na.jpg", "#2 0.500\na star"]
