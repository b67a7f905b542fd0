"""Names of images, as texts: a file's path, an http(s) address, or 'shard.tar#key' for a member of a tar.

The key is the member's name without its suffix. Nothing is opened here; fromage.images.open does that.
"""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from fromage.checks import ADDRESSES

MEMBER = ".tar#"  # stands between a shard and a key


def locator(shard: str, key: str) -> str:
    """The name of a member of a shard; shard ends in .tar."""
    return f"{shard}#{key}"


def split_locator(path: str) -> tuple[str, str | None]:
    """The file that a name begins with, and the key within it: ('a.tar', 'b') of 'a.tar#b', ('a.png', None) of 'a.png'.

    Of several '.tar#' the first counts.
    """
    shard, is_member, key = path.partition(MEMBER)
    return (f"{shard}.tar", key) if is_member else (path, None)


def name_of(path: str) -> str:
    """The file name, without folders: 'red.jpg', '00000.tar#key', the end of an address."""
    if path.startswith(ADDRESSES):
        try:
            where = urlsplit(path)
        except ValueError:
            return path
        return _last(unquote(where.path)) or where.netloc
    file, key = split_locator(path)
    return _last(file) if key is None else locator(_last(file), key)


def key_of(path: str) -> str:
    """The key within a shard; of other images the file name without its suffix."""
    _, key = split_locator(path)
    if key is not None and not path.startswith(ADDRESSES):
        return key
    name = _last(name_of(path))
    return name.rpartition(".")[0] or name


def _last(path: str) -> str:
    """The name at a path's end, as pathlib has it, at a fraction of its time: every hit of every reply asks."""
    return path.rstrip("/").rpartition("/")[2]
