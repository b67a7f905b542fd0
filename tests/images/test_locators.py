"""Names of images."""

import subprocess
import sys

import pytest

from fromage.images.locators import key_of, locator, name_of, split_locator


@pytest.mark.parametrize(
    ("path", "file", "key"),
    [
        ("/photos/a.jpg", "/photos/a.jpg", None),
        ("/photos/a#1.jpg", "/photos/a#1.jpg", None),
        ("/shards/0.tar", "/shards/0.tar", None),
        ("/shards/0.tar#a/b.c", "/shards/0.tar", "a/b.c"),
        ("/shards/0.tar#", "/shards/0.tar", ""),
        ("/shards/0.tar#a.tar#b", "/shards/0.tar", "a.tar#b"),
    ],
)
def test_a_name_is_split_into_file_and_key_and_put_together(path, file, key):
    assert split_locator(path) == (file, key)
    assert key is None or locator(file, key) == path


@pytest.mark.parametrize(
    ("path", "name", "key"),
    [
        ("/photos/red.one.jpg", "red.one.jpg", "red.one"),
        ("/photos/red/", "red", "red"),
        ("/photos/.jpg", ".jpg", ".jpg"),
        ("/a/.tar#k", ".tar#k", "k"),
        ("/shards/0.tar#a.tar#b", "0.tar#a.tar#b", "a.tar#b"),
        ("https://images.example/0.tar#k", "0.tar", "0"),
        ("/photos/red one.jpg", "red one.jpg", "red one"),
        ("/shards/00000.tar#a/k1", "00000.tar#a/k1", "a/k1"),
        ("https://images.example/a/b%20c.jpg?size=3", "b c.jpg", "b c"),
        ("https://images.example", "images.example", "images"),
        ("https://[broken/a.jpg", "https://[broken/a.jpg", "a"),
        ("/photos/caf\udce9.jpg", "caf\udce9.jpg", "caf\udce9"),  # a name that is not UTF-8
    ],
)
def test_an_image_has_a_short_name_and_a_key(path, name, key):
    assert (name_of(path), key_of(path)) == (name, key)


def test_the_command_line_splits_names_without_loading_a_library():
    program = "import fromage.images.locators, sys; print(*{'torch', 'numpy', 'PIL', 'pyarrow'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"
