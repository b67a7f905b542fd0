"""Where the checkpoints of a run are, and whether they are its own. Nothing that takes time is imported here.

Commands ask before any work.
"""

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


def goes_on(folder: Path, resumed: str | Path | None) -> bool:
    """Whether a run that begins from `resumed` goes on with the one that has its checkpoints in a folder."""
    last = last_checkpoint(folder)
    return resumed is not None and last is not None and Path(resumed).resolve() == last.resolve()


def others_checkpoints(folder: Path, resumed: str | Path | None, overwrite: bool) -> list[Path]:
    """The checkpoints in a folder that are of another run than the one that begins from `resumed`.

    Raises UserError where there are some, and they may not be replaced.
    """
    found = [] if goes_on(folder, resumed) else sorted(folder.glob("*.ckpt"))
    if found and not overwrite:
        raise UserError(
            f"{found[0]}: is of another run, and would be lost; go on with that run by --ckpt_path last, replace it by "
            "--overwrite, or name another dirpath"
        )
    return found
