"""The authors' embeddings of CC3M: pickles of {'paths': [URL, ...], 'embeddings': N rows of width q}, not normalised.

NumPy trusts what a pickle says of an array's memory; here only lists, texts, numbers and arrays of these are admitted, and
the arrays are made by us.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fromage.checkpoints.safe_pickle import Admitted, load_plain
from fromage.data.image_source import Item
from fromage.errors import UserError, first_line
from fromage.retrieval.item_table import Embedded, to_batch
from fromage.retrieval.rerank import unit

CHUNK = 1 << 16  # rows


def _latin1(text: str, encoding: str) -> bytes:
    """In place of _codecs.encode, with which pickles of protocol 2 write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"asks for the encoding {encoding}")
    return text.encode("latin1")


class _Dtype:
    """In place of numpy's dtype: a kind of number, and the order of its bytes; flags and fields are not read."""

    def __init__(self, name: str, *how: object) -> None:
        if not re.fullmatch("[fiu][1248]", name):
            raise pickle.UnpicklingError(f"asks for an array of {name}, which are no numbers")
        self.numpy = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array:
    """In place of numpy's array, which _reconstruct makes empty and the pickle then fills."""

    def __init__(self, *how: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, data = state
        self.values = _from_buffer(data, dtype, shape, "F" if by_columns else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values


def _from_buffer(buffer: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    """In place of numpy's _frombuffer, with which protocol 5 writes arrays."""
    return np.frombuffer(buffer, dtype.numpy).reshape(shape, order=order)


def _number(dtype: _Dtype, data: bytes) -> Any:
    """In place of numpy's scalar."""
    return np.frombuffer(data, dtype.numpy, 1)[0]


ADMITTED: Admitted = {
    ("numpy", "ndarray"): None,  # only named, as what _reconstruct is to make
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}
for _core in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
    ADMITTED[f"{_core}.multiarray", "_reconstruct"] = _Array
    ADMITTED[f"{_core}.multiarray", "scalar"] = _number
    ADMITTED[f"{_core}.numeric", "_frombuffer"] = _from_buffer


def read_embeddings(path: str | Path, width: int) -> tuple[np.ndarray, list[str]]:
    """(N, q) rows, not normalised, and the images' URLs.

    Raises:
        UserError: the file is no such pickle, asks for anything but arrays, or its rows are not `width` wide.
    """
    path = Path(path)
    try:
        data = load_plain(path, ADMITTED)
        urls, rows = data["paths"], data["embeddings"]  # N, (N, q)
        whole = isinstance(rows, (np.ndarray, _Array))
        rows = np.asarray(rows if whole else [np.ravel(row) for row in rows], dtype=np.float32)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the authors' embeddings pickle") from error
    except Exception as error:  # a broken pickle can raise nearly anything
        cause = first_line(error) if not isinstance(error, KeyError) else f"has no {error}"
        raise UserError(f"{path}: is not {{'paths': [...], 'embeddings': array}} ({cause[:200]}); not read") from error
    if rows.ndim != 2 or rows.shape[1] != width:
        raise UserError(f"{path}: embeddings of shape {rows.shape}; the model's are (rows, {width}); give its checkpoint")
    if not isinstance(urls, list) or len(urls) != len(rows) or not all(isinstance(url, str) for url in urls):
        raise UserError(f"{path}: 'paths' is not a list of {len(rows)} texts, one per embedding; get the file again")
    return rows, urls


def rows_of(paths: Sequence[str | Path], width: int) -> Iterator[Embedded]:
    """The unit rows and items of such pickles, as write_index takes them."""
    for path in paths:
        rows, urls = read_embeddings(path, width)
        for start in range(0, len(rows), CHUNK):
            items = [Item(url) for url in urls[start : start + CHUNK]]
            yield unit(rows[start : start + CHUNK], str(path)), to_batch(items)
