"""Where the checkpoints of a run are. Nothing that takes time is imported here: commands ask before any work."""

from __future__ import annotations

from pathlib import Path

from fromage.errors import UserError

LAST, BEFORE = "last.ckpt", "last-1.ckpt"
PLACES = ("", "checkpoints/", "version_*/checkpoints/")  # in a folder of checkpoints, of a run, of a run's versions


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint in a folder of checkpoints, of a run or of its versions, the newest; None where there is none."""
    for name in (LAST, BEFORE):
        if found := [path for place in PLACES for path in folder.glob(place + name)]:
            return max(found, key=lambda path: path.stat().st_mtime_ns)
    return None


def checkpoint_file(path: str | Path) -> Path:
    """The file that a path names, in a run's folder the newest. Raises UserError where there is none."""
    path = Path(path)
    found = path if path.is_file() else last_checkpoint(path)
    if found is None:
        other = last_checkpoint(path.parent.parent)
        hint = f"the newest of this run is {other}" if other else "`lightning fit` writes them under its run folder"
        raise UserError(f"checkpoint {path}: no such file{' in it' if path.is_dir() else ''}; {hint}")
    return found
