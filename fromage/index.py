"""The image index: build, save, load and search.

q is the width of the shared retrieval space, N the number of pictures in the index, B that of the queries.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from PIL import Image

from fromage.checkpoint import load_model
from fromage.contact_sheet import contact_sheet
from fromage.embed_pictures import embed_pictures
from fromage.errors import UserError
from fromage.model import Fromage
from fromage.picture_source import Item
from fromage.pictures import open_picture

FORMAT, VERSION = "fromage-index", 1
VECTORS, ITEMS, ABOUT = "index.faiss", "items.jsonl", "index.json"
NEAR_TIE = 1e-5  # FAISS rounds in float32; scores closer than this are compared again in float64


class Hit(NamedTuple):
    """A picture found. rank starts at 1; score is the cosine with the query."""

    rank: int
    score: float
    path: str
    caption: str


class ImageIndex:
    """An exact index over unit rows, where the inner product is the cosine.

    Attributes:
        vectors: FAISS index of the rows (N, q).
        items: the pictures, row by row.
        fingerprint: of the model that embedded them; only this model's queries mean anything here.
        checkpoint: path that model was loaded from; '' if not known.
    """

    def __init__(self, vectors: Any, items: Sequence[Item], fingerprint: str, checkpoint: str = "") -> None:
        self.vectors, self.items, self.fingerprint, self.checkpoint = vectors, list(items), fingerprint, checkpoint

    @classmethod
    def build(cls, embeddings: np.ndarray, items: Sequence[Item], fingerprint: str, checkpoint: str = "") -> ImageIndex:
        """Index (N, q) rows, scaled to unit length here. Raises UserError for no rows, odd numbers or one item too few."""
        rows = _unit(embeddings, "the index")
        if len(rows) == 0:
            raise UserError("an index needs at least one picture; none was given")
        if len(rows) != len(items):
            raise UserError(f"{len(rows)} embeddings for {len(items)} pictures; give one of each")
        vectors = faiss.IndexFlatIP(rows.shape[1])
        vectors.add(rows)
        return cls(vectors, items, fingerprint, checkpoint)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def width(self) -> int:
        """q."""
        return self.vectors.d

    @cached_property
    def _positions(self) -> dict[str, list[int]]:
        positions: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            positions.setdefault(item.path, []).append(i)
        return positions

    def search(self, queries: np.ndarray, k: int, exclude: Collection[str] | None = None) -> list[list[Hit]]:
        """The k pictures nearest to each query (B, q), best first, fewer if there are not as many.

        Equal scores keep the order of the index, and a query's hits do not depend on the others in its batch.

        Args:
            queries: rows of any length but zero.
            k: pictures per query, at least 1.
            exclude: paths that must not be found.
        """
        if k < 1:
            raise UserError(f"k is {k}; ask for at least one picture")
        rows = _unit(queries, "the query")  # (B, q)
        if rows.shape[1] != self.width:
            raise UserError(f"queries are {rows.shape[1]} wide, the index {self.width}; use the model that built the index")
        barred = {i for path in exclude or () for i in self._positions.get(path, ())}
        wanted = min(k + len(barred), len(self))
        candidates = self._candidates(rows, wanted)
        return [self._hits(row, near, barred)[:k] for row, near in zip(rows, candidates, strict=True)]

    def _candidates(self, rows: np.ndarray, wanted: int) -> list[np.ndarray]:
        """For each row, positions among which the true best are: FAISS is asked on until its last score is clearly worse."""
        fetch = min(wanted + 1, len(self))
        scores, positions = self.vectors.search(rows, fetch)  # (B, fetch) each
        found = list(positions)
        for b, row in enumerate(rows):
            last, n = scores[b], fetch
            while n < len(self) and last[-1] > last[wanted - 1] - NEAR_TIE:
                n = min(2 * n, len(self))
                (last,), (found[b],) = self.vectors.search(row[None], n)
        return found

    def _hits(self, row: np.ndarray, near: np.ndarray, barred: set[int]) -> list[Hit]:
        vectors = self.vectors.reconstruct_batch(near).astype(np.float64)  # (n, q)
        scores = (vectors * row).sum(axis=1)  # not a product of matrices: equal rows must give equal sums, wherever they lie
        order = [i for i in np.lexsort((near, -scores)) if near[i] not in barred]
        return [Hit(rank, float(scores[i]), *self.items[near[i]]) for rank, i in enumerate(order, start=1)]

    def save(self, folder: str | Path) -> None:
        """Write the index as a folder, whole or not at all; an index of ours that is there is replaced at once.

        Raises UserError where anything else is in the way.
        """
        folder = Path(folder).resolve()
        check_replaceable(folder)
        new, old = folder.with_name(f".{folder.name}.{os.getpid()}.new"), _aside(folder)
        shutil.rmtree(new, ignore_errors=True)
        try:
            new.mkdir(parents=True)
            self._write(new)
            _swap(new, folder, old)
        except (OSError, RuntimeError) as error:  # FAISS raises the latter when the disk is full
            raise UserError(f"{folder}: the index cannot be written ({error}); what was there before still is") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        faiss.write_index(self.vectors, str(folder / VECTORS))
        with (folder / ITEMS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(item._asdict()) + "\n" for item in self.items)
        about = {"format": FORMAT, "version": VERSION, "count": len(self), "width": self.width}
        about |= {"fingerprint": self.fingerprint, "checkpoint": self.checkpoint}
        about |= {"sha256": {name: _digest(folder / name) for name in (VECTORS, ITEMS)}}
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, fingerprint: str | None) -> ImageIndex:
        """Read a saved index. Raises UserError if it is damaged, or built by another model than fingerprint (None: any)."""
        folder = Path(folder).resolve()
        about = _read_about(folder)
        for name, digest in about["sha256"].items():
            if not (folder / name).is_file() or _digest(folder / name) != digest:
                raise UserError(f"{folder / name}: is missing or damaged (its digest differs); build the index again")
        vectors = faiss.read_index(str(folder / VECTORS))
        with (folder / ITEMS).open(encoding="utf-8") as file:
            items = [Item(**json.loads(line)) for line in file]
        if (vectors.ntotal, vectors.d, len(items)) != (about["count"], about["width"], about["count"]):
            raise UserError(f"{folder}: {ABOUT} tells of another index than is there; build it again")
        index = cls(vectors, items, about["fingerprint"], about["checkpoint"])
        if fingerprint is not None:
            index.require(fingerprint, folder)
        return index

    def require(self, fingerprint: str, folder: str | Path) -> None:
        """Raise UserError unless the model of this fingerprint built the index; folder is where it lies, for the message."""
        if fingerprint != self.fingerprint:
            raise UserError(
                f"{folder}: built with checkpoint {self.fingerprint} ({self.checkpoint or 'path unknown'}), not with "
                f"{fingerprint}; give the checkpoint it was built with, or build it again: fromage index build"
            )


def _unit(rows: np.ndarray, whose: str) -> np.ndarray:
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if rows.ndim != 2:
        raise UserError(f"embeddings of {whose} have the shape {rows.shape}; expected (rows, width)")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)  # (N, 1)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise UserError(f"embeddings of {whose} hold zero rows, infinities or NaN; is the checkpoint sound?")
    return rows / lengths


def check_replaceable(folder: str | Path) -> None:
    """Raise UserError unless an index may be saved here: nothing is here yet, or an index and no other file."""
    folder = Path(folder).resolve()
    if not folder.exists():
        return
    if not folder.is_dir() or {p.name for p in folder.iterdir()} != {VECTORS, ITEMS, ABOUT}:
        raise UserError(f"{folder}: exists and is not an index (or not only); choose another place or remove it")
    _read_about(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _swap(new: Path, folder: Path, old: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed here
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise


def _read_about(folder: Path) -> dict[str, Any]:
    if not folder.exists() and _aside(folder).exists():
        raise UserError(f"{folder}: saving was interrupted; the former index is whole: rename {_aside(folder)} to {folder}")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        known = (about["format"], about["version"]) == (FORMAT, VERSION) and set(about["sha256"]) == {VECTORS, ITEMS}
        if not known or not {"count", "width", "fingerprint", "checkpoint"} <= about.keys():
            raise ValueError("of another format or version")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: is no readable index ({error}); build one with: fromage index build") from error
    return about


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_index(
    model: Fromage,
    images: str | Path,
    out: str | Path,
    batch_size: int = 64,
    workers: int = 0,
    captions: str | Path | None = None,
    checkpoint: str | Path | None = None,
) -> ImageIndex:
    """Embed pictures and save their index as the folder out.

    Args:
        checkpoint: where the model was loaded from, so that open_index finds it. The others are those of embed_pictures.
    """
    check_replaceable(out)  # before the hours of embedding
    embeddings, items = embed_pictures(model, images, batch_size, workers, captions)
    where = str(Path(checkpoint).absolute()) if checkpoint else ""
    index = ImageIndex.build(embeddings, items, model.fingerprint(), where)
    index.save(out)
    return index


def open_index(folder: str | Path, ckpt: str | Path | None = None, device: str = "cpu") -> tuple[Fromage, ImageIndex]:
    """The model an index was built with, and the index. ckpt: where the model is now, if not where it was then."""
    index = ImageIndex.load(folder, None)
    if not ckpt and not (index.checkpoint and Path(index.checkpoint).is_file()):
        raise UserError(f"{folder}: its checkpoint is not at {index.checkpoint or '(not on record)'}; give it with --ckpt")
    model = load_model(ckpt or index.checkpoint, device)
    index.require(model.fingerprint(), folder)
    return model, index


def search_index(model: Fromage, index: ImageIndex, texts: Sequence[str], k: int = 5) -> list[list[Hit]]:
    """The k pictures nearest to each text."""
    if not texts:
        return []
    return index.search(model.embed_text(list(texts)).float().cpu().numpy(), k)


def draw_hits(texts: Sequence[str], hits: Sequence[Sequence[Hit]]) -> Image.Image:
    """A contact sheet: under each text its pictures with rank, score and caption. Pictures that are gone are grey."""
    rows = [[(_open_or_none(hit.path), f"#{hit.rank} {hit.score:.3f}\n{hit.caption}") for hit in row] for row in hits]
    return contact_sheet(list(zip(texts, rows, strict=True)))


def _open_or_none(locator: str) -> Image.Image | None:
    try:
        return open_picture(locator)
    except UserError:
        return None
