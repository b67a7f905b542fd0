"""Patch features of images on disk: the tower is frozen, so each image is encoded once, for every epoch and run."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fromage.data.annotations import TEXT, WHOLE, FieldType, Schema, optional, problem
from fromage.data.image_source import FileStamp
from fromage.data.workers import WorkerLoader
from fromage.errors import UserError
from fromage.identity import FolderKind
from fromage.io import WholeFile, parse_json, writing
from fromage.models.encode_files import Files
from fromage.models.vision.base import VisionTower

LINES, ROWS, LOCK = "pictures.jsonl", "patches.bf16", "lock"
IMAGE = "picture"  # key of the image in each line: its name in stores that were written before it was called so
STORE = FolderKind("tower.json", "patch features", of="tower", again="remove it; the next run makes it again")


STAMP = FieldType("a list of size and time", lambda value: value is None or not problem(value, (WHOLE,) * 2))
ROW = FieldType("the number of a row", lambda value: value is None or (WHOLE.fits(value) and value >= 0))
STORED: Schema = {IMAGE: TEXT, "row": ROW, "lost": optional(TEXT), "stamp": STAMP}  # a line


class PatchStore:
    """A folder of patch features (P, m) in bfloat16, by image; it grows, and a kill loses the last few images at most.

    tower.json names the tower; pictures.jsonl has a line for each image: a row's number or why it is lost, and the file's
    stamp, by which an image that was replaced is encoded again; patches.bf16 holds the rows. Opening only reads.
    """

    def __init__(self, folder: Path, vision: VisionTower) -> None:
        """Open a folder, or begin one. Raises UserError where it holds another tower's features, or something else."""
        self.folder, self.vision = folder, vision
        STORE.begin(folder, {**vision.fingerprint(), "shape": list(vision.shape)})
        self._read()
        self._mapped: Any = ()

    def _read(self) -> None:
        """What is stored whole: row, or why it is lost, of each image, and its file's stamp when it was looked at."""
        path, size = self.folder / LINES, self._bytes_of_a_row()
        stored = (self.folder / ROWS).stat().st_size // size if (self.folder / ROWS).exists() else 0
        lines = path.read_text("utf-8", "replace").splitlines(keepends=True) if path.exists() else []
        found = [self._line(number, line) for number, line in enumerate(lines, 1) if line.endswith("\n")]
        self._entries = [entry for entry in found if entry.get("row", -1) < stored]
        known = {entry[IMAGE]: entry for entry in self._entries}  # the last line about an image counts
        self.rows = {image: entry["row"] for image, entry in known.items() if "row" in entry}
        self.lost = {image: entry["lost"] for image, entry in known.items() if "lost" in entry}
        self._stamps = {image: entry.get("stamp") for image, entry in known.items()}

    def _line(self, number: int, line: str) -> dict[str, Any]:
        """Raises UserError for a line that is not as they are written."""
        try:
            entry = parse_json(line, f"line {number} of {LINES}", "")
        except UserError as error:
            raise STORE.unreadable(self.folder, str(error).partition(";")[0]) from error
        if wrong := problem(entry, STORED):
            raise STORE.unreadable(self.folder, f"line {number} of {LINES}{wrong}")
        return entry  # type: ignore[no-any-return]

    def _mend(self) -> int:
        """Cut off what is half written; returns how many rows there are. For the one process that adds."""
        with WholeFile(self.folder / LINES) as part:
            part.write_text("".join(json.dumps(entry) + "\n" for entry in self._entries), "utf-8")
        count = max((entry.get("row", -1) for entry in self._entries), default=-1) + 1
        with (self.folder / ROWS).open("ab") as file:
            file.truncate(count * self._bytes_of_a_row())
        return count

    def _bytes_of_a_row(self) -> int:
        return 2 * int(np.prod(self.vision.shape))

    def add(self, images: Sequence[str], batch_size: int = 64, workers: int = 0) -> None:
        """Encode those that are not there yet, or whose files have changed, with a progress bar.

        Several processes may ask for it: one encodes, the others wait and find it done.
        """
        stamps = {image: stamp_of(Path(image)) for image in images}
        if all(self._is_known(*each) for each in stamps.items()):
            return
        kept = "what is stored is kept, and the same command goes on"
        with writing(self.folder, kept), (self.folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read()
            todo = [Path(image) for image, stamp in stamps.items() if not self._is_known(image, stamp)]
            self._encode(todo, stamps, self._mend(), batch_size, workers)
        self._mapped = ()

    def _is_known(self, image: str, stamp: list[int] | None) -> bool:
        return image in self._stamps and self._stamps[image] == stamp

    def _encode(
        self, todo: list[Path], stamps: dict[str, list[int] | None], count: int, batch_size: int, workers: int
    ) -> None:
        files = Files(todo, self.vision.transform)
        loader = WorkerLoader(files, batch_size, num_workers=workers, collate_fn=list)
        done = 0
        with (self.folder / ROWS).open("ab") as rows, (self.folder / LINES).open("a", encoding="utf-8") as lines:
            for batch in tqdm(loader, "patches", len(loader), unit="batch", disable=not todo):
                some = list(zip(map(str, todo[done : done + len(batch)]), batch, strict=True))
                done += len(batch)
                if good := [pixels for _, pixels in some if isinstance(pixels, Tensor)]:
                    encoded = self.vision(torch.stack(good))
                    rows.write(encoded.to("cpu", torch.bfloat16).view(torch.uint16).numpy().tobytes())
                    rows.flush()
                for image, pixels in some:
                    entry: dict[str, Any] = {IMAGE: image, "stamp": stamps[image]}
                    if isinstance(pixels, Tensor):
                        entry["row"], count = count, count + 1
                    else:
                        entry["lost"] = pixels
                    lines.write(json.dumps(entry) + "\n")
                lines.flush()
        self._read()

    def __getitem__(self, image: str) -> Tensor:
        """(P, m) bfloat16."""
        if not len(self._mapped):
            self._mapped = np.memmap(
                self.folder / ROWS, np.uint16, "r", shape=(max(self.rows.values()) + 1, *self.vision.shape)
            )
        return torch.from_numpy(np.array(self._mapped[self.rows[image]])).view(torch.bfloat16)


def stamp_of(path: Path) -> list[int] | None:
    """Size in bytes and time of the last change of a file; None where it is not there."""
    now = FileStamp.at(path)
    return [now.size, now.changed] if now else None
