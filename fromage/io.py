"""Writing files whole: a part is written beside its name and takes it when it is on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fromage.errors import UserError


def as_json(value: Any) -> bytes:
    """JSON for people to read."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder; they get their names, in the order given, when all are on disk."""
    parts = {folder / name: folder / f".{name}.part" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, part in parts.items():
            part.write_bytes(files[path.name])
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); choose another folder") from error
    finally:
        if folder.is_dir():
            for part in parts.values():
                part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under its final name at once, whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
