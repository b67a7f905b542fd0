"""The authors' embeddings: pickles of {'paths': [URL, ...], 'embeddings': N rows of width q}, not normalised.

The rows are an array, as released of CC3M, or a list of arrays or of tensors, as their extract_img_embs.py writes it. NumPy
trusts what a pickle says of an array's memory; here only lists, texts, numbers, tensors and arrays of numbers are admitted,
and the arrays are made by us, over the file's own bytes.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fromage.checkpoints.safe_pickle import TENSORS, Admitted, Inert, StandIn, load_plain
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


class _Dtype(StandIn):
    """In place of numpy's dtype: a kind of number, and the order of its bytes; flags and fields are not read."""

    def __init__(self, name: str, *how: object) -> None:
        if not re.fullmatch("[fiu][1248]", name):
            raise pickle.UnpicklingError(f"asks for an array of {name}, which are no numbers")
        self.numpy = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array(StandIn):
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
    ("collections", "OrderedDict"): Inert,  # a tensor's hooks, of which it has none
    **TENSORS,
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
        size = path.stat().st_size
        rows = _stacked(rows, size) if isinstance(rows, list) else _values(rows)
        if sum(map(len, urls)) > size:
            raise ValueError("its paths are longer than the file")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the authors' embeddings pickle") from error
    except Exception as error:  # a broken pickle can raise nearly anything
        odd = f"has no {error}" if isinstance(error, KeyError) else "damaged, or of another layout"
        cause = first_line(error) if isinstance(error, ValueError | pickle.UnpicklingError) else odd
        raise UserError(f"{path}: is not {{'paths': [...], 'embeddings': array}} ({cause[:200]}); not read") from error
    if rows.ndim != 2 or rows.shape[1] != width:
        raise UserError(f"{path}: embeddings of shape {rows.shape}; the model's are (rows, {width}); give its checkpoint")
    if not isinstance(urls, list) or len(urls) != len(rows) or not all(isinstance(url, str) for url in urls):
        raise UserError(f"{path}: 'paths' is not a list of {len(rows)} texts, one per embedding; get the file again")
    return rows, urls


def _values(numbers: Any) -> np.ndarray:
    """An array, a tensor or a list of numbers as float32."""
    if isinstance(numbers, list):
        while len(numbers) == 1 and isinstance(numbers[0], list):
            numbers = numbers[0]
        if any(not isinstance(number, (int, float, np.number)) for number in numbers):
            raise ValueError("an embedding is no list of numbers")
    elif not isinstance(numbers, (np.ndarray, _Array, Tensor)):
        raise ValueError(f"an embedding is of the type {type(numbers).__name__}")
    return np.asarray(numbers.detach().float() if isinstance(numbers, Tensor) else numbers, dtype=np.float32)


def _row(numbers: Any) -> np.ndarray:
    """(q,) of one embedding, whose dimensions of one are left out."""
    values = _values(numbers)
    return values.reshape(values.shape[-1:]) if values.size == values.shape[-1:][0] else values


def _stacked(rows: list[Any], size: int) -> np.ndarray:
    """N embeddings of q numbers each -> (N, q). size: of the file in bytes; a file may name one embedding many times."""
    first = _row(rows[0]) if rows else np.empty(0, np.float32)  # (q,)
    if len(rows) * first.size > size:
        raise ValueError(f"{len(rows)} embeddings of {first.size} numbers in a file of {size} bytes")
    out = np.empty((len(rows), first.size), np.float32)  # (N, q)
    for number, row in enumerate(rows):
        values = _row(row)  # (q,)
        if values.shape != first.shape or values.ndim != 1:
            raise ValueError(f"embedding {number} has the shape {values.shape}, the first one {first.shape}")
        out[number] = values
    return out


def rows_of(paths: Sequence[str | Path], width: int) -> Iterator[Embedded]:
    """The unit rows and items of such pickles, as write_index takes them."""
    for path in paths:
        rows, urls = read_embeddings(path, width)
        for start in range(0, len(rows), CHUNK):
            items = [Item(url) for url in urls[start : start + CHUNK]]
            yield unit(rows[start : start + CHUNK], str(path)), to_batch(items)
