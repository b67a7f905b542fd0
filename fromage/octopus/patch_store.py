"""Patch features of pictures on disk: the tower is frozen, so each picture is encoded once, for every epoch and run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fromage.backbones import PatchTower
from fromage.errors import UserError
from fromage.evals.encoded import Files
from fromage.loader import init_worker
from fromage.shards import write_json

ABOUT, LINES, ROWS = "tower.json", "pictures.jsonl", "patches.bf16"


class PatchStore:
    """A folder of patch features (P, m) in bfloat16, by picture; it grows, and a kill loses the last few pictures at most.

    tower.json names the tower; pictures.jsonl has a line for each picture, a row's number or why it is lost; patches.bf16
    holds the rows.
    """

    def __init__(self, folder: Path, vision: PatchTower) -> None:
        """Open a folder, or begin one. Raises UserError where it holds another tower's features, or something else."""
        self.folder, self.vision = folder, vision
        about = {**vision.fingerprint(), "shape": list(vision.shape)}
        if (folder / ABOUT).exists():
            if json.loads((folder / ABOUT).read_text("utf-8")) != about:
                raise UserError(f"{folder}: holds patches of another tower; name another folder, or remove it")
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: holds no patches, but something else; name another folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / ABOUT, about)
        self.rows, self.lost = self._listed()
        self._mapped: Any = ()

    def _listed(self) -> tuple[dict[str, int], dict[str, str]]:
        """Rows by picture, and why others are lost; whatever was half written is cut off."""
        path, size = self.folder / LINES, self._bytes_of_a_row()
        stored = (self.folder / ROWS).stat().st_size // size if (self.folder / ROWS).exists() else 0
        whole = (
            [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
            if path.exists()
            else []
        )
        found = [json.loads(line) for line in whole]
        kept = [entry for entry in found if entry.get("row", -1) < stored]
        rows = {entry["picture"]: entry["row"] for entry in kept if "row" in entry}
        path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), "utf-8")
        with (self.folder / ROWS).open("ab") as file:
            file.truncate(len(rows) * size)
        return rows, {entry["picture"]: entry["lost"] for entry in kept if "lost" in entry}

    def _bytes_of_a_row(self) -> int:
        return 2 * int(np.prod(self.vision.shape))

    def add(self, pictures: Sequence[str], batch_size: int = 64, workers: int = 0) -> None:
        """Encode those that are not there yet, with a progress bar."""
        todo = [Path(p) for p in dict.fromkeys(pictures) if p not in self.rows and p not in self.lost]
        files = Files(todo, self.vision.transform)
        loader: Any = DataLoader(files, batch_size, num_workers=workers, collate_fn=list, worker_init_fn=init_worker)
        done = 0
        with (self.folder / ROWS).open("ab") as rows, (self.folder / LINES).open("a", encoding="utf-8") as lines:
            for batch in tqdm(loader, desc="patches", unit="batch", disable=not todo):
                some = list(zip(map(str, todo[done : done + len(batch)]), batch, strict=True))
                done += len(batch)
                good = [picture for picture, pixels in some if isinstance(pixels, Tensor)]
                if good:
                    encoded = self.vision(torch.stack([pixels for _, pixels in some if isinstance(pixels, Tensor)]))
                    rows.write(encoded.to("cpu", torch.bfloat16).view(torch.uint16).numpy().tobytes())
                    rows.flush()
                self.rows |= {picture: len(self.rows) + i for i, picture in enumerate(good)}
                self.lost |= {picture: cause for picture, cause in some if isinstance(cause, str)}
                for picture, _ in some:
                    where = {"row": self.rows[picture]} if picture in self.rows else {"lost": self.lost[picture]}
                    lines.write(json.dumps({"picture": picture, **where}) + "\n")
                lines.flush()

    def __getitem__(self, picture: str) -> Tensor:
        """(P, m) bfloat16."""
        if len(self._mapped) != len(self.rows):
            self._mapped = np.memmap(self.folder / ROWS, np.uint16, "r", shape=(len(self.rows), *self.vision.shape))
        return torch.from_numpy(np.array(self._mapped[self.rows[picture]])).view(torch.bfloat16)
