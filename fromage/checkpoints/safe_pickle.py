"""Pickles of other people's data. A pickle can run any program when it is read; here it gets only what is admitted.

What a file claims is compared with the file: pieces of text and bytes, tensors, the records of torch.save's zip. The memo is
a dictionary, as in Python's own unpickler; the one in C makes a table as long as the largest number in the file.
"""

from __future__ import annotations

import io
import mmap
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fromage.errors import UserError, reason

Admitted = dict[tuple[str, str], Callable[..., Any] | None]  # by module and name, what a pickle gets in their place
LARGE = 1 << 20  # bytes from which a piece of a mapped file is not copied


class StandIn:
    """What a pickle gets in place of a class: the only kind of object that takes the state which the pickle has for it."""

    def __setstate__(self, state: Any) -> None:
        """Called with that state."""


class Inert(StandIn):
    """In place of what is not admitted, where that is not refused: it can be called and filled, and does nothing."""

    def __init__(self, *args: Any, **named: Any) -> None:
        """Forget the arguments, of which a pickle gives any."""

    def extend(self, items: Any) -> None:
        """As of a list."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """As of a dictionary."""

    append = add = extend


class _Bounded:
    """A file that is asked for no more than it has left; of a mapped one, large pieces are views."""

    def __init__(self, file: Any) -> None:
        self.file, place = file, file.tell()
        self.size = file.seek(0, io.SEEK_END) or file.tell()  # a map's seek returns nothing
        file.seek(place)
        self.readline = file.readline

    def read(self, count: int) -> bytes | memoryview:
        """Exactly so many bytes."""
        place = self.file.tell()
        if count > self.size - place:
            raise EOFError(f"{count} bytes are announced where {self.size - place} are left")
        if count < LARGE or not isinstance(self.file, mmap.mmap):
            return bytes(self.file.read(count))
        self.file.seek(place + count)
        return memoryview(self.file)[place : place + count]


class _Unpickler(pickle._Unpickler):
    """Unknown names are refused, or, where inert, stand for Inert."""

    def __init__(self, file: Any, admitted: Mapping[tuple[str, str], Any], inert: bool = False) -> None:
        super().__init__(_Bounded(file), encoding="utf-8", errors="replace")  # type: ignore[arg-type]  # of Python 2's texts
        self.admitted, self.inert = admitted, inert

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.admitted:
            return self.admitted[module, name]
        if self.inert:
            return Inert
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which such a file has no need of")

    def load_build(self) -> None:
        """The state of what is last on the stack: only stand-ins take it, nothing else gets attributes."""
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        state = stack.pop()
        if isinstance(stack[-1], StandIn):
            stack[-1].__setstate__(state)

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # type: ignore  # noqa: RUF012


def load_plain(path: Path, admitted: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """What a pickle holds: lists, dictionaries, texts and numbers, and things made by what is admitted.

    Large bytes are views of the file. Raises OSError for a file that cannot be read, and nearly anything (UnpicklingError
    for what is not admitted) for one that is broken.
    """
    with path.open("rb") as file:
        return _Unpickler(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), admitted or {}).load()


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    """In place of torch's own, which lets a tensor claim more numbers than its storage holds."""
    untyped, dtype = storage._untyped_storage, storage.dtype
    held = untyped.nbytes() // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or prod(size) > held or (prod(size) and last >= held):
        raise pickle.UnpicklingError(f"a tensor of {tuple(size)} in a storage of {held} numbers")
    return torch.empty(0, dtype=dtype, device="cpu").set_(untyped, offset, size, stride)


def _storage(data: bytes) -> Any:
    """In place of torch's own, which runs what is in the bytes."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _data(data: Any, *rest: Any) -> Any:
    """In place of what makes a Parameter."""
    return data


TENSORS: Admitted = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _data,
    ("torch.storage", "_load_from_bytes"): _storage,
}


class _Foreign(_Unpickler):
    """As torch.load asks for one. Of OrderedDict it gives a dictionary."""

    def __init__(self, file: Any, **how: Any) -> None:
        super().__init__(file, {**TENSORS, ("collections", "OrderedDict"): dict}, inert=True)


_FOREIGN = SimpleNamespace(__name__="fromage", Unpickler=_Foreign, load=lambda file, **how: _Foreign(file).load())


def read_pickle(path: Path, foreign: bool = False) -> Any:
    """What torch.save wrote, on the CPU; nothing in it is executed.

    foreign: what is neither a container, a text, a number nor a tensor is Inert, in place of being refused; tensors of a zip
    are mapped, not read. Raises UserError when the file is torn, claims more than it holds, or holds code.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_zip(path)
        if not foreign:
            return torch.load(path, map_location="cpu", weights_only=True)
        if not zipped and tarfile.is_tarfile(path):
            raise pickle.UnpicklingError("is a tar")
        return torch.load(path, map_location="cpu", weights_only=False, mmap=zipped, pickle_module=_FOREIGN)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path}: is none, or asks to run code when it is read; not read") from error
    except Exception as error:  # a flipped bit can raise anything
        raise UserError(f"checkpoint {path}: unreadable or not a checkpoint ({reason(error)[:120]})") from error


def _check_zip(path: Path) -> None:
    """Raise BadZipFile unless records are stored as torch.save stores them, each beside the others, and are whole."""
    with zipfile.ZipFile(path) as content:
        records = content.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise zipfile.BadZipFile("a record of it is compressed")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise zipfile.BadZipFile("its records are longer than the file")
        if any(Path(record.filename).name == "constants.pkl" for record in records):
            raise zipfile.BadZipFile("it is a TorchScript program")
        if torn := content.testzip():
            raise zipfile.BadZipFile(f"{torn} is damaged")
