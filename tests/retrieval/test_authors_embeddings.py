import os
import pickle
import struct
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_faiss_index import rows

from fromage.errors import UserError
from fromage.retrieval.authors_embeddings import read_embeddings, rows_of
from fromage.retrieval.build import write_index
from fromage.retrieval.index_spec import IndexSpec

URLS = [f"https://images.example/{i}.jpg" for i in range(6)]


def write(path, data, protocol=4, module=None):
    """Pickle; module: as another version of NumPy names its own."""
    raw = pickle.dumps(data, protocol)
    if module and protocol < 4:
        raw = raw.replace(b"cnumpy._core.", module.encode())
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_arrays_of_every_protocol(tmp_path, protocol, dtype):
    wanted = rows(6).astype(dtype)
    for data in (wanted, list(wanted), np.asfortranarray(wanted), wanted[:, None].tolist(), [row[None] for row in wanted]):
        path = write(tmp_path / "e.pkl", {"paths": URLS, "embeddings": data}, protocol)
        embeddings, urls = read_embeddings(path, 4)
        np.testing.assert_array_equal(embeddings, wanted.astype(np.float32))
        assert urls == URLS


@pytest.mark.parametrize("protocol", [2, 3])
def test_arrays_of_numpy_1(tmp_path, protocol):
    data = {"paths": URLS, "embeddings": rows(6)}
    path = write(tmp_path / "e.pkl", data, protocol, "cnumpy.core.")
    assert b"numpy.core.multiarray" in path.read_bytes() or protocol > 3
    np.testing.assert_array_equal(read_embeddings(path, 4)[0], rows(6))


def test_numbers_of_numpy(tmp_path):
    path = write(tmp_path / "e.pkl", {"paths": URLS, "embeddings": [list(row) for row in rows(6)]})
    np.testing.assert_array_equal(read_embeddings(path, 4)[0], rows(6))


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lists_of_tensors_as_extract_img_embs_writes_them(tmp_path, dtype, protocol):
    wanted = torch.from_numpy(rows(6)).to(dtype)
    for data in ([row.clone() for row in wanted], list(wanted), [row[None] for row in wanted], wanted):
        path = write(tmp_path / "e.pkl", {"paths": URLS, "embeddings": data}, protocol)
        embeddings, urls = read_embeddings(path, 4)
        np.testing.assert_array_equal(embeddings, wanted.float().numpy())
        assert embeddings.dtype == np.float32 and urls == URLS
    rows_of_it = list(rows_of([path], 4))
    np.testing.assert_allclose(np.linalg.norm(rows_of_it[0][0], axis=1), 1, rtol=1e-6)


def test_a_single_embedding_stays_a_row(tmp_path):
    for data in (rows(1), list(rows(1)), [torch.from_numpy(rows(1)[0])]):
        path = write(tmp_path / "e.pkl", {"paths": URLS[:1], "embeddings": data})
        assert read_embeddings(path, 4)[0].shape == (1, 4)


def test_ragged_rows_are_named_and_shift_no_other(tmp_path):
    ragged = [*rows(2), rows(1, q=3)[0], rows(1, q=5)[0], *rows(2)]  # as many numbers as six rows of four
    for data in (ragged, [torch.from_numpy(row.copy()) for row in ragged], [row.tolist() for row in ragged]):
        with pytest.raises(UserError, match=r"e\.pkl.*embedding 2 has the shape \(3,\), the first one \(4,\)"):
            read_embeddings(write(tmp_path / "e.pkl", {"paths": URLS, "embeddings": data}), 4)


def test_what_a_file_names_many_times_does_not_grow(tmp_path):
    row, url = rows(1, q=4096)[0], "u" * 4096
    for data in (
        {"paths": URLS * 1000, "embeddings": [row] * 6000},
        {"paths": URLS * 1000, "embeddings": [torch.from_numpy(row)] * 6000},
        {"paths": [url] * 6000, "embeddings": rows(6000)},
    ):
        path = write(tmp_path / "e.pkl", data)
        assert path.stat().st_size < 1 << 18
        with pytest.raises(UserError, match=r"e\.pkl.*(of 4096 numbers in a file of|paths are longer than the file)"):
            read_embeddings(path, 4096)
    with pytest.raises(UserError, match=r"e\.pkl"):
        read_embeddings(write(tmp_path / "e.pkl", {"paths": URLS, "embeddings": [torch.zeros(1).expand(4096)] * 6}), 4096)


def test_a_released_array_is_not_copied(tmp_path):
    wanted = rows(1 << 12, q=256)
    path = write(tmp_path / "e.pkl", {"paths": [str(i) for i in range(len(wanted))], "embeddings": wanted})
    tracemalloc.start()
    embeddings, _ = read_embeddings(path, 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(embeddings, wanted)
    assert peak < wanted.nbytes / 2


class Malicious:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("call", [(os.mkdir,), (eval,), (exec,), (np.load,), (getattr, "")])
def test_programs_are_not_run(tmp_path, protocol, call):
    made = tmp_path / "made"
    arguments = [str(made)] if call[0] in (os.mkdir, np.load) else [f"__import__('os').mkdir({str(made)!r})"]
    for data in ({"paths": URLS, "embeddings": Malicious(*call, *arguments)}, Malicious(*call, *arguments)):
        path = write(tmp_path / "e.pkl", data, protocol)
        with pytest.raises(UserError, match=r"e\.pkl.*asks for"):
            read_embeddings(path, 4)
        assert not made.exists()


def test_objects_hidden_in_an_array_are_not_made(tmp_path):
    array = np.array([Malicious(os.mkdir, str(tmp_path / "made"))], dtype=object)
    with pytest.raises(UserError, match="asks for"):
        read_embeddings(write(tmp_path / "e.pkl", {"paths": URLS, "embeddings": array}), 4)
    assert not (tmp_path / "made").exists()


def test_other_codecs_and_types_are_refused(tmp_path):
    for raw in (
        b"c_codecs\nencode\n(S'ab'\nS'zip'\ntR.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"cnumpy\ndtype\n(S'f4,O'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
    ):
        (tmp_path / "e.pkl").write_bytes(raw)
        with pytest.raises(UserError, match="asks for"):
            read_embeddings(tmp_path / "e.pkl", 4)


@pytest.mark.parametrize(
    "embeddings",
    [
        b"cnumpy\nndarray\n((I1\nI256\ntcnumpy\ndtype\n(S'O8'\ntRB" + struct.pack("<I", 2048) + b"A" * 2048 + b"tR",
        b"cnumpy\nndarray\n((I1\nI256\ntcnumpy\ndtype\n(S'f4'\ntRB" + struct.pack("<I", 1024) + b"A" * 1024 + b"tR",
        b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR",  # never filled
        b"cnumpy\ndtype\n(S'f4'\ntR(I3\nS'<'\nNNNI-1\nI-1\nI63\ntb",  # numbers with the flags of objects
    ],
)
def test_memory_of_a_pickles_making_is_not_taken_for_an_array(tmp_path, embeddings):
    (tmp_path / "e.pkl").write_bytes(b"(dS'paths'\n(lS'a'\nasS'embeddings'\n" + embeddings + b"s.")
    with pytest.raises(UserError, match=r"e\.pkl"):
        read_embeddings(tmp_path / "e.pkl", 256)


BAD = [
    [1, 2],
    {},
    {"paths": URLS},
    {"paths": URLS[:3], "embeddings": rows(6)},
    {"paths": list(range(6)), "embeddings": rows(6)},
    {"paths": "abcdef", "embeddings": rows(6)},
    {"paths": URLS, "embeddings": rows(6, q=5)},
    {"paths": URLS, "embeddings": rows(6)[0]},
    {"paths": URLS, "embeddings": [rows(6)[0], rows(1, q=3)[0]]},
    {"paths": URLS, "embeddings": "text"},
    OrderedDict(paths=URLS, embeddings=rows(6)),
]


@pytest.mark.parametrize("data", BAD)
def test_other_contents_are_refused(tmp_path, data):
    with pytest.raises(UserError, match=r"e\.pkl"):
        read_embeddings(write(tmp_path / "e.pkl", data), 4)


def test_broken_files_are_refused(tmp_path):
    whole = pickle.dumps({"paths": URLS, "embeddings": rows(6)})
    for data in (b"", whole[:50], whole[:-100], b"no pickle", struct.pack("<Q", 2**63), b"\x80\x05" + b"\xff" * 50):
        (tmp_path / "e.pkl").write_bytes(data)
        with pytest.raises(UserError, match=r"e\.pkl"):
            read_embeddings(tmp_path / "e.pkl", 4)
    with pytest.raises(UserError, match="cannot be read"):
        read_embeddings(tmp_path / "none.pkl", 4)


def test_they_become_an_index(tmp_path):
    data = 7 * rows(6)
    first = write(tmp_path / "1.pkl", {"paths": URLS[:4], "embeddings": data[:4]})
    second = write(tmp_path / "2.pkl", {"paths": URLS[4:], "embeddings": list(data[4:])})
    index = write_index(tmp_path / "index", rows_of([first, second], 4), IndexSpec(4, "f00d"))
    assert [hits[0].path for hits in index.search(data, 1)] == URLS
    assert all(hits[0].score == pytest.approx(1) for hits in index.search(data, 1))
