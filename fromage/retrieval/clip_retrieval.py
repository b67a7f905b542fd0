"""Embeddings of clip-retrieval and autofaiss, as rows of an index.

clip-retrieval leaves img_emb/img_emb_0.npy ... (n, w) and metadata/metadata_0.parquet ..., a row each; autofaiss reads
folders of Parquet files with a column `embedding`. Both hold features of a CLIP or another tower at unit length. They are
taken where our own embeddings of some of the images say that the tower is ours: features (w = m), or rows of the retrieval
space (w = q). CLIP's projection of the features cannot be undone, so embeddings after it match no model that reads them
before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from fromage.data.image_source import Item
from fromage.errors import UserError, first_line
from fromage.images.open import open_image
from fromage.models.fromage import Fromage
from fromage.models.prompts import encode_images
from fromage.retrieval.image_root import ImageRoot
from fromage.retrieval.item_table import Embedded, to_batch
from fromage.retrieval.rerank import unit
from fromage.retrieval.table_file import Table, as_keys, kept_columns

PATHS = ("image_path", "path", "url")  # columns that say where an image is; the first that is there counts
EMBEDDING = "embedding"
PROBED, TRIED = 16, 64  # images that are embedded to compare, and how many are tried to be opened
SAME, OWN = 0.98, 0.9  # median cosine from which the towers are the same, and share of images that are nearest to themselves
CHUNK = 1 << 14  # rows


class EmbeddingPart(NamedTuple):
    """Embeddings in an .npy file and what is known of them in a Parquet file, or both in the latter."""

    rows: Path
    about: Path


class EmbeddingFolder:
    """The embeddings in a folder."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where there are none, or nothing says which images they are of."""
        self.folder, self.parts = folder, _parts(folder)

    @cached_property
    def tables(self) -> list[pa.Table]:
        """What is known of the images, part by part."""
        return [_table(part) for part in self.parts]

    @cached_property
    def path(self) -> str:
        """The column that says where an image is."""
        there = set.intersection(*({*table.column_names} for table in self.tables))
        if not (found := next((name for name in PATHS if name in there), "")):
            raise UserError(f"{self.folder}: its tables have no column {', '.join(PATHS[:-1])} or {PATHS[-1]}; add one")
        return found

    def table(self) -> Table:
        """The other columns as metadata; of images at the same path the first counts."""
        whole = pa.concat_tables(self.tables, promote_options="permissive")
        first = np.unique(pc.rank(whole.column(self.path), tiebreaker="min").to_numpy(), return_index=True)[1]
        whole = whole.take(pa.array(np.sort(first)))
        keys = as_keys(whole.column(self.path).cast(pa.string()))
        return Table(keys, kept_columns(self.folder, whole.drop_columns([self.path])), str(self.folder))

    def features(self) -> Iterator[tuple[np.ndarray, list[Item]]]:
        """(n, w) float32 and their images, some at a time."""
        for part, table in zip(self.parts, self.tables, strict=True):
            rows = _rows(part)  # (n, w)
            if len(rows) != len(table):
                raise UserError(f"{part.about}: {len(table)} rows for {len(rows)} embeddings; get the files again")
            captions = table.column("caption") if "caption" in table.column_names else pa.nulls(len(table), pa.string())
            for start in range(0, len(rows), CHUNK):
                where, said = (c.slice(start, CHUNK).to_pylist() for c in (table.column(self.path), captions))
                items = [Item(str(path or ""), str(text or "")) for path, text in zip(where, said, strict=True)]
                yield np.asarray(rows[start : start + CHUNK], np.float32), items

    def embedded(self, model: Fromage, root: ImageRoot, within: str) -> Iterator[Embedded]:
        """Unit rows of the model's retrieval space, and their images.

        Raises UserError unless the model embeds some of the images as they are here; they are opened within a folder, or
        fetched. root: what their paths are relative to.
        """
        way = self._way(model, root, within)
        for rows, items in self.features():
            yield unit(way(rows), str(self.folder)), to_batch(items)

    @torch.no_grad()
    def _way(self, model: Fromage, root: ImageRoot, within: str) -> Callable[[np.ndarray], np.ndarray]:
        """What turns stored rows (n, w) into rows (n, q)."""
        rows, images = self._probe(root, within)  # (p, w), p
        features = encode_images(model, images)  # (p, m)
        mine = model.embed_images(features).float().cpu().numpy()  # (p, q)
        length = float(features.float().norm(dim=-1).median())  # which unit rows have lost

        def projected(rows: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                at_length = torch.from_numpy(unit(rows, str(self.folder)) * length).to(model.device)  # (n, m)
                return model.embed_images(at_length).float().cpu().numpy()  # (n, q)

        ways = [projected] * (rows.shape[1] == model.vision.width) + [lambda rows: rows] * (rows.shape[1] == model.q)
        told = f"are {rows.shape[1]} wide, the tower's features {model.vision.width}, the index {model.q}"
        for way in ways:
            cosines = mine @ unit(way(rows), str(self.folder)).T  # (p, p)
            median, own = float(np.median(np.diag(cosines))), float(np.mean(cosines.argmax(1) == np.arange(len(mine))))
            if median >= SAME and own >= OWN:
                return way
            told = f"are like those of this checkpoint by a cosine of {median:.2f} ({len(mine)} images embedded to compare)"
        raise UserError(f"{self.folder}: of another tower: its rows {told}; embed the images: fromage index embed")

    def _probe(self, root: ImageRoot, within: str) -> tuple[np.ndarray, list[Image.Image]]:
        """Rows (p, w) of images that can be opened, and these, no two of them at the same path."""
        rows: list[np.ndarray] = []
        images: dict[str, Image.Image] = {}
        why = "there is none"
        for vectors, items in self.features():
            for i in np.unique(np.linspace(0, len(items) - 1, min(len(items), TRIED), dtype=int)):
                path = root.path_of(items[i].path)
                if path in images:
                    continue
                try:
                    images[path] = open_image(path, within)
                    rows.append(vectors[i])
                except UserError as error:
                    why = str(error)
                if len(rows) == PROBED:
                    return np.stack(rows), list(images.values())
            if rows:
                return np.stack(rows), list(images.values())
        raise UserError(f"{self.folder}: none of its images can be opened to compare ({why}); name their folder by --images")


def _parts(folder: Path) -> list[EmbeddingPart]:
    arrays, tables = sorted((folder / "img_emb").glob("*.npy")), sorted((folder / "metadata").glob("*.parquet"))
    if arrays and [_number(path) for path in arrays] == [_number(path) for path in tables]:
        return [EmbeddingPart(*pair) for pair in zip(arrays, tables, strict=True)]
    if arrays:
        raise UserError(f"{folder}: {len(arrays)} files in img_emb and {len(tables)} in metadata, which do not fit; get all")
    if own := sorted(folder.glob("*.parquet")):
        return [EmbeddingPart(path, path) for path in own]
    raise UserError(f"{folder}: holds neither img_emb/*.npy with metadata/*.parquet nor *.parquet with a column {EMBEDDING}")


def _number(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def _table(part: EmbeddingPart) -> pa.Table:
    try:
        names = [name for name in pq.read_schema(part.about).names if name != EMBEDDING]
        return pq.read_table(part.about, columns=names)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{part.about}: cannot be read as Parquet ({first_line(error)}); get the file again") from error


def _rows(part: EmbeddingPart) -> np.ndarray:
    """(n, w) numbers."""
    try:
        if part.rows.suffix == ".npy":
            rows = np.load(part.rows, mmap_mode="r", allow_pickle=False)
        else:
            column = pq.read_table(part.rows, columns=[EMBEDDING]).column(0).combine_chunks()
            widths = pc.unique(pc.list_value_length(column))
            if len(widths) != 1 or column.null_count:
                raise ValueError("rows of different lengths")
            rows = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), widths[0].as_py())
        if rows.ndim != 2 or rows.dtype.kind != "f":
            raise ValueError(f"an array of the shape {rows.shape} and the type {rows.dtype}")
        return rows
    except (OSError, ValueError, EOFError, AttributeError, pa.ArrowException) as error:
        raise UserError(f"{part.rows}: holds no embeddings ({first_line(error)}); get the file again") from error
