"""Ids of images: nobody without the machine's secret can check a guess of a path."""

from hashlib import blake2b

import numpy as np

from fromage.data.image_source import Item
from fromage.retrieval.faiss_index import FaissIndex
from fromage.serving.image_ids import ImageIds


def index(count=50):
    rows = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    return FaissIndex.build(rows, [Item(f"/photos/{i}.jpg") for i in range(count)], "f00d")


def test_ids_find_their_images_and_are_no_digest_of_a_path(tmp_path):
    index().save(tmp_path / "index")
    ids, items = ImageIds(index()), list(index().items)
    made = [ids.of(item.path) for item in items]
    assert [ids.find(name) for name in made] == items and len({*made}) == 50
    guesses = [form(item.path) for item in items for form in (str, lambda path: path.rpartition("/")[2])]
    assert not {blake2b(guess.encode(), digest_size=8).hexdigest() for guess in guesses} & {*made}
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in made) and ids.find("0" * 16) is None


def test_servers_of_one_user_agree_and_those_of_others_do_not(tmp_path, monkeypatch):
    one, same = ImageIds(index()), ImageIds(index())
    assert one.of("/photos/1.jpg") == same.of("/photos/1.jpg")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert ImageIds(index()).of("/photos/1.jpg") != one.of("/photos/1.jpg")
