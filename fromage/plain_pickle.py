"""Pickles of other people's data. A pickle can run any program when it is read; here it gets only what is admitted."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

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
