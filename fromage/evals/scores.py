"""Scores of VisDial's candidate answers on disk: a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fromage.errors import UserError
from fromage.evals.base import made_by
from fromage.evals.dialogues import Dialogue
from fromage.identity import FolderKind
from fromage.images.transforms import Framing
from fromage.io import write_files
from fromage.models.fromage import Fromage

FORMAT = 1  # of the prompts; another one where their words change


def identity(model: Fromage, dialogues: Sequence[Dialogue], protocols: Mapping[str, Framing]) -> dict[str, Any]:
    """What scores belong to: a model, dialogues in order, their images, and the protocols, each with its framing."""
    digest = hashlib.sha256(repr([(talk.image.name, talk.rounds) for talk in dialogues]).encode()).hexdigest()[:16]
    made = made_by(model, [talk.image for talk in dialogues])
    return {"prompts": FORMAT, "dialogues": digest, "protocols": dict(protocols), **made}


SCORES = FolderKind(
    "about.json",
    "scores",
    of="checkpoint, or of other dialogues",
    remedy="name another --scores",
    again="remove it and run it again",
)


class ScoreStore:
    """One file for each dialogue, 000000.npy and on, beside about.json; in memory only where there is no folder."""

    def __init__(self, folder: Path | None, about: dict[str, Any]) -> None:
        """about: see identity. Raises UserError for a folder of another identity, or with something else in it."""
        self.folder = folder
        if folder is not None:
            SCORES.begin(folder, about)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:06d}.npy"

    def __contains__(self, number: int) -> bool:
        return self.folder is not None and self._path(number).is_file()

    def get(self, number: int) -> np.ndarray:
        """(protocols, R, C) scores that are there. Raises UserError for a file that is damaged."""
        path = self._path(number)
        try:
            return np.load(path, mmap_mode="r").copy()  # which believes no shape that the file is too short for
        except Exception as error:  # a damaged header raises nearly anything
            raise UserError(f"{path}: is damaged; remove it and run it again") from error

    def put(self, number: int, scores: np.ndarray) -> np.ndarray:
        """Keep scores, under their name only when whole; returns them."""
        if self.folder is not None:
            file = io.BytesIO()
            np.save(file, scores)
            write_files(self.folder, {self._path(number).name: file.getvalue()})
        return scores
