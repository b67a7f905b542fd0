"""Pickles of other people's data. A pickle can run any program when it is read; here it gets only what is admitted."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fromage.errors import UserError, first_line

Admitted = dict[tuple[str, str], Callable[..., Any] | None]  # by module and name, what a pickle gets in their place


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, admitted: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")  # of Python 2's texts
        self.admitted = admitted

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, which such a file has no need of")
        return self.admitted[module, name]


def load_plain(path: Path, admitted: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """What a pickle holds: lists, dictionaries, texts and numbers, and things made by what is admitted.

    Raises OSError for a file that cannot be read, and nearly anything (UnpicklingError for what is not admitted) for one
    that is broken.
    """
    with path.open("rb") as file:
        return _Unpickler(file, admitted or {}).load()


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, on the CPU; nothing in it is executed. Raises UserError when it is torn or holds code."""
    try:
        if zipfile.is_zipfile(path) and (torn := zipfile.ZipFile(path).testzip()):
            raise zipfile.BadZipFile(f"{torn} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path}: is none, or asks to run code when it is read; not read") from error
    except Exception as error:  # a flipped bit can raise anything
        raise UserError(f"checkpoint {path}: unreadable or not a checkpoint ({first_line(error)[:120]})") from error
