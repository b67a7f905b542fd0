"""Making saved indexes: from embeddings, and from other indexes by adding, removing and merging.

Each of these streams rows into a new folder, which takes the place of the old one when it is whole. Approximate kinds keep
what they have learnt, and are measured anew, with the captions they were first measured with.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from fromage.checks import bare
from fromage.errors import UserError
from fromage.locks import held
from fromage.models.fromage import Fromage
from fromage.models.prompts import max_length, prompt_length
from fromage.retrieval.ann import MEASURED_WITH, ANNIndex, default_kind
from fromage.retrieval.base import FLAT, ImageIndex, IndexSpec
from fromage.retrieval.embed_images import embed_images
from fromage.retrieval.embedding_store import EmbeddingStore
from fromage.retrieval.index_folder import ABOUT, check_replaceable, read_about
from fromage.retrieval.item_table import Embedded, without
from fromage.retrieval.open_index import BACKENDS, backend_of, load_index
from fromage.retrieval.rerank import unit


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
    overwrite: bool = False,
) -> ImageIndex:
    """Write unit rows as an index. Raises UserError where one is there already and may not be replaced.

    Args:
        width: q.
        fingerprint: of the model that embedded them; checkpoint is where it lies, if that is known.
        kind: see fromage.retrieval.ann; None chooses by the number of rows.
        trained: an index of the kind, which holds the first of the rows or none.
        texts: (n, q) unit rows that texts ask with, to measure an approximate kind with.
        milvus: where the rows go in place of this disk, see fromage.retrieval.milvus_client; kind is then one of Milvus.
        overwrite: replace an index that is there.
    """
    spec = IndexSpec(width, fingerprint, checkpoint, kind, trained, texts, milvus or "", overwrite)
    with held(out, beside=True):
        old = read_about(Path(out)) if (Path(out) / ABOUT).exists() else None
        index = BACKENDS[_backend(milvus)].write(out, rows, spec)
        if old:
            BACKENDS[backend_of(old)].drop(old)
    return index


def _backend(milvus: str | None) -> str:
    return "milvus" if milvus else "faiss"


def build(
    store: EmbeddingStore,
    out: str | Path,
    kind: str | None = None,
    model: Fromage | None = None,
    milvus: str | None = None,
    overwrite: bool = False,
) -> ImageIndex:
    """Index what embed_images stored.

    model: the one that embedded the images; with it an approximate kind is measured with their captions too. Raises
    UserError for another. milvus, overwrite: as for write_index.
    """
    check_replaceable(out, overwrite)
    about = store.about
    if model and model.fingerprint() != about["fingerprint"]:
        raise UserError(f"{store.folder}: embedded with another checkpoint than this; give its own, or embed anew")
    kind = kind if milvus else kind or default_kind(len(store))
    texts = _texts(store, model) if model and kind and not milvus and kind.lower() != FLAT else None
    of = about["width"], about["fingerprint"], about["checkpoint"]
    return write_index(out, _rows(store), *of, kind, texts=texts, milvus=milvus, overwrite=overwrite)


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
    overwrite: bool = False,
) -> ImageIndex:
    """Embed images and save their index as the folder out; what is embedded outlasts a kill, beside out.

    Args:
        checkpoint: where the model was loaded from, so that open_index finds it.
        kind: as for write_index.
        milvus: as for write_index.
        overwrite: as for write_index. The others are those of embed_images.
    """
    check_replaceable(out, overwrite)  # before the hours of embedding
    BACKENDS[_backend(milvus)].check(kind, model.q, milvus or "")
    out = Path(out).resolve()
    beside = out.with_name(f".{out.name}.{model.fingerprint()}.embeddings")
    with held(out, beside=True):
        store = embed_images(model, images, beside, batch_size, workers, captions, checkpoint)
        index = build(store, out, kind, model, milvus, overwrite)
        shutil.rmtree(beside)
    return index


def add(folder: str | Path, store: EmbeddingStore) -> ImageIndex:
    """Put embeddings behind those of an index, which keeps its kind; images that are there already stay as they are."""
    with held(folder, beside=True):  # or what another process puts there between reading and writing would be lost
        return load_index(folder, store.about["fingerprint"]).add(folder, _rows(store))


def remove(folder: str | Path, paths: Sequence[str]) -> ImageIndex:
    """Take images out of an index, every one at these paths. Raises UserError for a path that is not there."""
    with held(folder, beside=True):
        return load_index(folder).remove(folder, bare(paths))


def merge(
    folders: Sequence[str | Path],
    out: str | Path,
    kind: str | None = None,
    milvus: str | None = None,
    overwrite: bool = False,
) -> ImageIndex:
    """Write one index of several. Of images at the same path the first counts.

    kind: None is that of the first, where this is of the same backend as the one written. overwrite: as for write_index.
    """
    check_replaceable(out, overwrite)
    folders = bare(folders)
    first = load_index(folders[0])
    indexes = [first, *(load_index(folder, first.fingerprint) for folder in folders[1:])]
    parts, seen = [first.rows()], first.paths()
    for index in indexes[1:]:
        parts.append(without(index.rows(), seen))
        seen = pa.chunked_array([*seen.chunks, *index.paths().chunks], pa.binary())
    texts = np.concatenate([index.texts for index in indexes])  # (n, q)
    trained = None
    if first.backend == _backend(milvus):  # one backend's names of kinds mean nothing to another
        trained = first.learnt(folders[0]) if kind in (None, first.kind) else None
        kind = kind or first.kind
    of = first.width, first.fingerprint, first.checkpoint
    some = texts[:: max(1, len(texts) // MEASURED_WITH)]
    return write_index(out, chain(*parts), *of, kind, trained, some, milvus, overwrite)


def _rows(store: EmbeddingStore) -> Iterator[Embedded]:
    return ((unit(rows, str(store.folder)), items) for rows, items in store.batches())
