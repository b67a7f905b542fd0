"""Making saved indexes: from embeddings, and from other indexes by adding, removing and merging.

Each of these streams rows into a new folder, which takes the place of the old one when it is whole. Approximate kinds keep
what they have learnt, and are measured anew, with the captions they were first measured with.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fromage.errors import UserError
from fromage.models.fromage import Fromage
from fromage.models.prompts import max_length, prompt_length
from fromage.retrieval import milvus_index as milvus_index
from fromage.retrieval.ann import FLAT, MEASURED_WITH, ANNIndex, check_kind, default_kind
from fromage.retrieval.embed_images import embed_images
from fromage.retrieval.embedding_store import EmbeddingStore
from fromage.retrieval.faiss_index import ImageIndex, open_rows, unit, write_rows
from fromage.retrieval.index_folder import CANDIDATES, check_replaceable, replacing
from fromage.retrieval.item_table import Embedded, keep_mask
from fromage.retrieval.milvus_collection import reach
from fromage.retrieval.milvus_index import MilvusIndex


def write_index(
    out: str | Path,
    rows: Iterable[Embedded],
    width: int,
    fingerprint: str,
    checkpoint: str = "",
    kind: str | None = None,
    trained: ANNIndex | None = None,
    texts: np.ndarray | None = None,
    milvus: str | None = None,
) -> ImageIndex:
    """Write unit rows as an index.

    Args:
        width: q.
        fingerprint: of the model that embedded them; checkpoint is where it lies, if that is known.
        kind: see fromage.retrieval.ann; None chooses by the number of rows.
        trained: an index of the kind, which holds the first of the rows or none.
        texts: (n, q) unit rows that texts ask with, to measure an approximate kind with.
        milvus: where the rows go in place of this disk, see fromage.retrieval.milvus_collection; kind is then one of Milvus.
    """
    if milvus:
        return milvus_index.write(out, rows, width, fingerprint, checkpoint, kind, milvus)
    check_kind(kind, width)
    old = milvus_index.former(out)
    with replacing(out) as new:
        write_rows(new, rows)
        index = ImageIndex(*open_rows(new, width), fingerprint, checkpoint, texts=texts)
        index.prepare(kind or default_kind(len(index)), trained)
        index.finish(new)
    milvus_index.drop(old)
    return ImageIndex.load(out, fingerprint)


def build(
    store: EmbeddingStore,
    out: str | Path,
    kind: str | None = None,
    model: Fromage | None = None,
    milvus: str | None = None,
) -> ImageIndex:
    """Index what embed_images stored.

    model: the one that embedded the images; with it an approximate kind is measured with their captions too. Raises
    UserError for another. milvus: as for write_index.
    """
    check_replaceable(out)
    about = store.about
    if model and model.fingerprint() != about["fingerprint"]:
        raise UserError(f"{store.folder}: embedded with another checkpoint than this; give its own, or embed anew")
    kind = kind if milvus else kind or default_kind(len(store))
    texts = _texts(store, model) if model and kind and not milvus and kind.lower() != FLAT else None
    of = about["width"], about["fingerprint"], about["checkpoint"]
    return write_index(out, _rows(store), *of, kind, texts=texts, milvus=milvus)


def _texts(store: EmbeddingStore, model: Fromage) -> np.ndarray | None:
    """(n, q) unit rows that some of the captions ask with, as they are searched for; None where there are none."""
    captions = store.captions()
    some = np.random.default_rng(0).choice(len(captions), min(MEASURED_WITH, len(captions)), replace=False)
    texts = [caption.decode("utf-8", "replace") for caption in captions.take(pa.array(np.sort(some))).to_pylist()]
    short = [text for text in texts if prompt_length(model, text) < (max_length(model) or math.inf)]  # [RET] comes behind
    return model.embed_text(short).float().cpu().numpy() if short else None


def build_index(
    model: Fromage,
    images: str | Path,
    out: str | Path,
    batch_size: int = 64,
    workers: int = 0,
    captions: str | Path | None = None,
    checkpoint: str | Path | None = None,
    kind: str | None = None,
    milvus: str | None = None,
) -> ImageIndex:
    """Embed images and save their index as the folder out; what is embedded outlasts a kill, beside out.

    Args:
        checkpoint: where the model was loaded from, so that open_index finds it.
        kind: as for write_index.
        milvus: as for write_index. The others are those of embed_images.
    """
    check_replaceable(out)  # before the hours of embedding
    if milvus:
        reach(milvus)
    else:
        check_kind(kind, model.q)
    out = Path(out).resolve()
    beside = out.with_name(f".{out.name}.{model.fingerprint()}.embeddings")
    store = embed_images(model, images, beside, batch_size, workers, captions, checkpoint)
    index = build(store, out, kind, model, milvus)
    shutil.rmtree(beside)
    return index


def add(folder: str | Path, store: EmbeddingStore) -> ImageIndex:
    """Put embeddings behind those of an index, which keeps its kind; images that are there already stay as they are."""
    index = ImageIndex.load(folder, None)
    index.require(store.about["fingerprint"], folder)
    if isinstance(index, MilvusIndex):
        index.add(_rows(store))
        index.save(folder)
        return index
    rows = chain(index.rows(), _without(_rows(store), index.paths()))
    return _rewrite(folder, index, rows, _learnt(folder, index))


def remove(folder: str | Path, paths: Sequence[str]) -> ImageIndex:
    """Take images out of an index, every one at these paths. Raises UserError for a path that is not there."""
    index = ImageIndex.load(folder, None)
    names = [path.encode("utf-8", "surrogateescape") for path in paths]
    if isinstance(index, MilvusIndex):
        rows = index.collection.rows_of(names)
        _require(folder, names, rows)
        index.remove([row for found in rows.values() for row in found])
        index.save(folder)
        return index
    barred = pa.chunked_array([pa.array(names, pa.binary())])
    _require(folder, names, set(index.paths().filter(pc.is_in(index.paths(), value_set=barred)).to_pylist()))
    trained = _learnt(folder, index)
    if trained:
        trained.index.reset()  # forgets the rows, not the training
    return _rewrite(folder, index, _without(index.rows(), barred), trained)


def _require(folder: str | Path, names: Iterable[bytes], there: Collection[bytes]) -> None:
    if gone := [name for name in names if name not in there]:
        name = gone[0].decode("utf-8", "replace")
        raise UserError(f"{folder}: has no image {name}; give paths as `fromage search` prints them")


def merge(folders: Sequence[str | Path], out: str | Path, kind: str | None = None, milvus: str | None = None) -> ImageIndex:
    """Write one index of several. Of images at the same path the first counts. kind: the first one's, unless given."""
    indexes = [ImageIndex.load(folder, None) for folder in folders]
    first = indexes[0]
    for index, folder in zip(indexes, folders, strict=True):
        index.require(first.fingerprint, folder)
    parts, seen = [first.rows()], first.paths()
    for index in indexes[1:]:
        parts.append(_without(index.rows(), seen))
        seen = pa.chunked_array([*seen.chunks, *index.paths().chunks], pa.binary())
    if milvus or isinstance(first, MilvusIndex):  # the one's names of kinds mean nothing to the other
        of = first.width, first.fingerprint, first.checkpoint
        return write_index(out, chain(*parts), *of, kind, milvus=milvus)
    trained = _learnt(folders[0], first) if kind in (None, first.kind) else None
    texts = np.concatenate([index.texts for index in indexes])  # (n, q)
    first.texts = texts[:: max(1, len(texts) // MEASURED_WITH)]
    return _rewrite(out, first, chain(*parts), trained, kind)


def _rewrite(
    out: str | Path, like: ImageIndex, rows: Iterable[Embedded], trained: ANNIndex | None, kind: str | None = None
) -> ImageIndex:
    about = like.width, like.fingerprint, like.checkpoint
    return write_index(out, rows, *about, kind or like.kind, trained, like.texts)


def _learnt(folder: str | Path, index: ImageIndex) -> ANNIndex | None:
    """The candidates of a saved index, in memory, where they can be changed."""
    old = index.candidates
    return old and ANNIndex.read(Path(folder) / CANDIDATES, old.kind, old.setting, old.recall, mapped=False)


def _rows(store: EmbeddingStore) -> Iterator[Embedded]:
    return ((unit(rows, str(store.folder)), items) for rows, items in store.batches())


def _without(rows: Iterable[Embedded], barred: pa.ChunkedArray) -> Iterator[Embedded]:
    """The rows whose items are at none of the barred paths."""
    for vectors, items in rows:
        keep = keep_mask(items, barred)
        yield vectors[keep], items.filter(pa.array(keep))
