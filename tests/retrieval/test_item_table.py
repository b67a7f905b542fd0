"""items.arrow is mapped: what it says of its own buffers is checked before it is used."""

import random

import numpy as np
import pyarrow as pa
import pytest

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.retrieval.image_root import ImageRoot
from fromage.retrieval.item_table import SCHEMA, ItemTable, to_batch, without, write_items

ITEMS = [Item(f"/a/{i}.jpg", f"image {i}", '{"n": 1}' * (i % 2), "1 2 3") for i in range(40)]


@pytest.fixture
def path(tmp_path):
    write_items(tmp_path / "items.arrow", [to_batch(ITEMS[:25]), to_batch(ITEMS[25:])])
    return tmp_path / "items.arrow"


def test_items_come_back_and_lie_at_their_root(path):
    assert ItemTable.open(path) == ITEMS and ItemTable.open(path, ImageRoot("/b", "/a"))[30].path == "/b/30.jpg"
    moved = ItemTable.open(path, ImageRoot("/b", "/a"))
    assert [p.decode() for p in moved.paths().to_pylist()] == [item.path for item in moved]
    assert [p for batch in moved.slices(7) for p in batch.column("path").to_pylist()] == moved.paths().to_pylist()


@pytest.mark.parametrize("value", [60_000, 1 << 30, -1])
def test_an_offset_beyond_its_buffer_is_refused(path, value):
    """Read as it is, it would show what lies after in memory, or end the process."""
    data = bytearray(path.read_bytes())
    good = np.cumsum([0, *(len(item.caption) for item in ITEMS[:25])]).astype(np.int32).tobytes()
    at = data.index(good)
    data[at + 4 : at + 8] = np.int32(value).tobytes()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"items\.arrow: is damaged .*build the index again"):
        ItemTable.open(path)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_buffers_which_claim_any_size_are_refused(path, compression):
    with pa.ipc.new_file(str(path), SCHEMA, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(to_batch([Item("/a", "x" * 10_000)] * 100))
    with pytest.raises(UserError, match="compressed"):
        ItemTable.open(path)


def test_other_columns_and_missing_entries_are_refused(path):
    for table in (
        pa.table({"path": pa.array(["a"]), "caption": pa.array(["b"])}),
        pa.table({"path": pa.array([b"a"]), "other": pa.array([b"b"])}),
        pa.table({"path": pa.array([b"a", None]), "caption": pa.array([b"b", b"c"])}),
        pa.table({"path": pa.array([b"a"]).dictionary_encode(), "caption": pa.array([b"b"])}),
    ):
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(UserError, match="is damaged"):
            ItemTable.open(path)


def test_a_changed_byte_anywhere_is_harmless(path):
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(400):
        odd = bytearray(data)
        for _ in range(rng.choice([1, 3])):
            at = rng.randrange(len(odd))
            odd[at : at + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\0\0\0\0", bytes([rng.randrange(256)])])
        path.write_bytes(odd[: rng.choice([len(odd), rng.randrange(len(odd))])])
        try:
            table = ItemTable.open(path)
        except UserError:
            continue
        assert len(list(table)) == len(table) and table.finder()("0" * 16) is None


def test_a_table_of_a_former_version_has_neither_metadata_nor_stamps(path):
    former = pa.schema([("path", pa.binary()), ("caption", pa.binary())])
    with pa.ipc.new_file(str(path), former) as writer:
        writer.write_batch(pa.record_batch([pa.array([b"/a.jpg"]), pa.array([b"b"])], schema=former))
    assert ItemTable.open(path) == [Item("/a.jpg", "b")]


def test_the_paths_that_are_barred_are_gone_through_once():
    class Barred:
        seen = 0

        @property
        def chunks(self):
            self.seen += 1
            return [pa.array([b"/1", b"/7"]), pa.array([b"/4"])]

    batches = [(np.arange(3 * i, 3 * i + 3), to_batch([Item(f"/{3 * i + j}") for j in range(3)])) for i in range(3)]
    left = list(without(batches, barred := Barred()))
    assert np.concatenate([rows for rows, _ in left]).tolist() == [0, 2, 3, 5, 6, 8] and barred.seen == 1
    assert [item.path for item in ItemTable([items for _, items in left])] == ["/0", "/2", "/3", "/5", "/6", "/8"]
