"""Making saved indexes: from embeddings, ours or others', and from other indexes by adding, removing and merging.

Each of these streams rows into a new folder, which takes the place of the old one when it is whole. Approximate kinds keep
what they have learnt, and are measured again, with the captions they were first measured with.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from fromage.checks import as_list
from fromage.data.image_source import is_shards
from fromage.errors import UserError
from fromage.io import write_json
from fromage.locks import held
from fromage.models.fromage import Fromage, load_model
from fromage.models.prompts import RET, prompt_length
from fromage.places import state_folder
from fromage.retrieval.ann import MEASURED_WITH, default_kind
from fromage.retrieval.authors_embeddings import rows_of
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.clip_retrieval import EmbeddingFolder
from fromage.retrieval.embed_images import absolute_checkpoint, embed_images
from fromage.retrieval.embedding_store import EmbeddingStore
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.image_root import ImageAccess, ImageRoot
from fromage.retrieval.index_folder import ABOUT, check_files, check_replaceable, read_about
from fromage.retrieval.index_spec import FLAT, IndexSpec
from fromage.retrieval.item_table import Embedded, without
from fromage.retrieval.open_index import BACKENDS, backend_of, load_index
from fromage.retrieval.rerank import as_float32, unit
from fromage.retrieval.table_file import Table
from fromage.retrieval.trust import is_sealed, sealed


def write_index(out: str | Path, rows: Iterable[Embedded], spec: IndexSpec) -> ImageIndex:
    """Write unit rows as an index. Raises UserError where one is there already and may not be replaced."""
    with held(out, beside=True):
        old = read_about(Path(out)) if (Path(out) / ABOUT).exists() else None
        index = BACKENDS[_backend(spec.milvus)].write(out, rows, spec)
        if old:
            BACKENDS[backend_of(old)].drop(old)
    return index


def _backend(milvus: str | None) -> str:
    return "milvus" if milvus else "faiss"


def build(
    store: EmbeddingStore,
    out: str | Path,
    kind: str | None = None,
    *,
    model: Fromage | None = None,
    milvus: str | None = None,
    overwrite: bool = False,
    tables: Sequence[Table] = (),
) -> ImageIndex:
    """Index what embed_images stored.

    model: the one that embedded the images; with it an approximate kind is measured with their captions too. Raises
    UserError for another. milvus, overwrite, tables: as of IndexSpec.
    """
    check_replaceable(out, overwrite)
    about = store.about
    if model and model.fingerprint() != about["fingerprint"]:
        raise UserError(f"{store.folder}: embedded with another checkpoint than this; give its own, or embed again")
    kind = kind if milvus else kind or default_kind(len(store))
    texts = _texts(store, model) if model and kind and not milvus and kind.lower() != FLAT else None
    root = about.get("root", "")
    spec = IndexSpec(
        width=about["width"],
        fingerprint=about["fingerprint"],
        checkpoint=about["checkpoint"],
        kind=kind,
        texts=texts,
        milvus=milvus or "",
        overwrite=overwrite,
        place=ImageAccess(ImageRoot(root) if root else None, store.is_own()),
        tables=tables,
    )
    return write_index(out, unit_rows(store), spec)


def _texts(store: EmbeddingStore, model: Fromage) -> np.ndarray | None:
    """(n, q) unit rows that some of the captions ask with, as they are searched for; None where there are none."""
    captions = store.captions()
    some = np.random.default_rng(0).choice(len(captions), min(MEASURED_WITH, len(captions)), replace=False)
    texts = [caption.decode("utf-8", "replace") for caption in captions.take(pa.array(np.sort(some))).to_pylist()]
    short = [text for text in texts if prompt_length(model, [text, RET]) <= (model.lm.max_length or math.inf)]
    return model.embed_text(short).float().cpu().numpy() if short else None


def build_index(
    model: Fromage,
    images: str | Path,
    out: str | Path,
    *,
    batch_size: int = 64,
    workers: int = 0,
    captions: str | Path | None = None,
    checkpoint: str | Path | None = None,
    kind: str | None = None,
    milvus: str | None = None,
    overwrite: bool = False,
    tables: Sequence[Table] = (),
) -> ImageIndex:
    """Embed images and save their index as the folder out; what is embedded outlasts a kill, beside out.

    Args:
        checkpoint: where the model was loaded from, so that open_index finds it.
        kind: as of IndexSpec.
        milvus: where the rows go in place of this disk, see fromage.retrieval.milvus_client.
        overwrite: replace an index that is there.
        tables: as of IndexSpec. The others are those of embed_images.
    """
    check_replaceable(out, overwrite)  # before the hours of embedding
    BACKENDS[_backend(milvus)].check(kind, model.q, milvus or "")
    out = Path(out).resolve()
    beside = out.with_name(f".{out.name}.{model.fingerprint()}.embeddings")
    with held(out, beside=True):
        store = embed_images(
            model, images, beside, batch_size=batch_size, workers=workers, captions=captions, checkpoint=checkpoint
        )
        index = build(store, out, kind, model=model, milvus=milvus, overwrite=overwrite, tables=tables)
        shutil.rmtree(beside)
    index.model = model
    return index


def import_embeddings(
    load: Callable[[], Fromage],
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    images: str | Path | None = None,
    checkpoint: str | Path | None = None,
    kind: str | None = None,
    milvus: str | None = None,
    overwrite: bool = False,
) -> ImageIndex:
    """Save an index of embeddings that others made as the folder out.

    It names files of other machines, so of those here only what lies in the folder of its images is ever opened.

    Args:
        load: gives the model whose retrieval space the rows are in; called when a folder looks right. Pickles are read after
            it.
        sources: the authors' pickles of N paths and (N, q) rows, see fromage.retrieval.authors_embeddings; or one folder of
            clip-retrieval or autofaiss with features (n, m) of the model's tower or rows (n, q), see
            fromage.retrieval.clip_retrieval.
        images: folder that the paths in them are relative to; None opens no file but those within out.
        checkpoint: where the model was loaded from, so that open_index finds it.
        kind: as of IndexSpec.
        milvus: as of build_index.
        overwrite: as of build_index.

    Raises:
        UserError: a source cannot be read, or its rows are of another width or of another tower than the model's; there are
            several sources and one is a folder; what is at out may not be replaced.
    """
    paths = [Path(source) for source in as_list(sources)]
    folders = [path for path in paths if path.is_dir()]
    if folders and len(paths) > 1:
        raise UserError(f"{folders[0]}: is a folder; import it alone, and put indexes together by `fromage index merge`")
    check_replaceable(out, overwrite)
    gallery = EmbeddingFolder(folders[0]) if folders else None
    tables = [gallery.table()] if gallery else []
    model = load()
    root = ImageRoot(str(Path(images).absolute()) if images else "")
    within = root.path or str(Path(out).absolute())
    spec = IndexSpec(
        width=model.q,
        fingerprint=model.fingerprint(),
        checkpoint=absolute_checkpoint(checkpoint),
        kind=kind,
        milvus=milvus or "",
        overwrite=overwrite,
        place=ImageAccess(root, confined=True, within=within),
        tables=tables,
    )
    rows = gallery.embedded(model, root, within) if gallery else rows_of(paths, model.q)
    index = write_index(out, rows, spec)
    index.model = model
    return index


def from_folder(
    images: str | Path,
    model: Fromage | str | Path,
    out: str | Path | None = None,
    *,
    captions: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    kind: str | None = None,
) -> ImageIndex:
    """See ImageIndex.from_folder."""
    checkpoint = model if isinstance(model, (str, Path)) else None
    reading: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "captions": captions, "checkpoint": checkpoint}
    model = load_model(model) if isinstance(model, (str, Path)) else model
    saved = next((Path(each) for each in (out, images) if each is not None and (Path(each) / ABOUT).exists()), None)
    if saved:
        index = load_index(saved, model.fingerprint())
        if saved != Path(images) and not is_shards(Path(images)) and index.root.path != str(Path(images).absolute()):
            index = load_index(saved, model.fingerprint(), images)
        if said := index.missing().said(saved, len(index), index.place.own):
            warnings.warn(said, stacklevel=3)
    elif out is not None:
        index = build_index(model, images, out, kind=kind, **reading)
    else:
        with TemporaryDirectory() as folder:
            store = embed_images(model, images, Path(folder) / "store", **reading)
            index = FaissIndex.in_memory(unit_rows(store), model.fingerprint(), kind)
    index.model = model
    return index


def add(folder: str | Path, store: EmbeddingStore, tables: Sequence[Table] = ()) -> ImageIndex:
    """Put embeddings after those of an index, which keeps its kind; images that are there already stay as they are.

    The root of its images becomes the folder that holds both, but that of an imported index stays. Embeddings from elsewhere
    make it one from elsewhere.

    tables: metadata of images that have none yet, see fromage.retrieval.table_file.read_table.
    """
    with held(folder, beside=True):  # or what another process puts there between reading and writing would be lost
        index = load_index(folder, store.about["fingerprint"])
        index.set_place(replace(index.place, own=index.place.own and store.is_own()))
        return index.add(folder, unit_rows(store), _joint([index.root.path, store.about.get("root", "")]), tables)


def describe(folder: str | Path, tables: Sequence[Table]) -> ImageIndex:
    """Give an index the metadata of tables in place of its own, see fromage.retrieval.table_file.read_table."""
    with held(folder, beside=True):
        return load_index(folder).describe(folder, tables)


def _joint(roots: Sequence[str]) -> ImageRoot | None:
    """The folder that holds all of some roots; None where one is not known."""
    return ImageRoot(os.path.commonpath(roots)) if all(roots) else None


def remove(folder: str | Path, paths: str | Sequence[str]) -> ImageIndex:
    """Take images out of an index, every one at these paths. Raises UserError for a path that is not there."""
    with held(folder, beside=True):
        return load_index(folder).remove(folder, as_list(paths))


def merge(
    folders: Sequence[str | Path],
    out: str | Path,
    kind: str | None = None,
    *,
    milvus: str | None = None,
    overwrite: bool = False,
) -> ImageIndex:
    """Write one index of several. Of images at the same path the first counts. One from elsewhere makes all of it one.

    kind: None is that of the first, where this is of the same backend as the one written. overwrite: as of IndexSpec.
    """
    check_replaceable(out, overwrite)
    folders = as_list(folders)
    first = load_index(folders[0])
    indexes = [first, *(load_index(folder, first.fingerprint) for folder in folders[1:])]
    parts, seen = [_in_full(first.rows())], first.paths()
    for index in indexes[1:]:
        parts.append(without(_in_full(index.rows()), seen))
        seen = pa.chunked_array([*seen.chunks, *index.paths().chunks], pa.binary())
    texts = np.concatenate([index.texts for index in indexes])  # (n, q)
    trained = None
    if first.backend == _backend(milvus):  # one backend's names of kinds mean nothing to another
        trained = first.learnt(folders[0]) if kind in (None, first.kind) else None
        kind = kind or first.kind
    own = all(index.place.own and not index.place.confined for index in indexes)
    spec = IndexSpec(
        width=first.width,
        fingerprint=first.fingerprint,
        checkpoint=first.checkpoint,
        kind=kind,
        trained=trained,
        texts=texts[:: max(1, len(texts) // MEASURED_WITH)],
        milvus=milvus or "",
        overwrite=overwrite,
        place=ImageAccess(_joint([index.root.path for index in indexes]), own),
        tables=[table for index in indexes if (table := index.table())],
    )
    return write_index(out, chain(*parts), spec)


def _in_full(rows: Iterable[Embedded]) -> Iterator[Embedded]:
    """Rows in float32, also those that their index keeps in float16."""
    return ((as_float32(vectors), items) for vectors, items in rows)


def trust(folder: str | Path, images: str | Path | None = None) -> ImageIndex:
    """Seal an index as one that was built here, so that what it says is believed: paths, Milvus, FAISS file.

    images: the folder where its images are from now on; None for where they were. Raises UserError where it is damaged,
    and where this machine has no place for its secret.
    """
    folder = Path(folder).resolve()
    if images is not None and not Path(images).is_dir():
        raise UserError(f"{images}: is no folder; name the folder of the images of {folder}")
    with held(folder, beside=True):
        return _trusted(folder, images)


def _trusted(folder: Path, images: str | Path | None) -> ImageIndex:
    about = read_about(folder)
    check_files(folder, about, full=True)
    about.pop("confined", None)
    if images is not None and about.get("root"):
        about["root"] = str(Path(images).absolute())
    write_json(folder / ABOUT, sealed(about))
    if not is_sealed(read_about(folder)):
        raise UserError(
            f"{state_folder()}: the secret of this machine cannot be kept there; name a folder in XDG_STATE_HOME"
        )
    index = load_index(folder, images=images)
    if images is not None and not about.get("root"):
        index.set_place(replace(index.place, within=None))
        index = index.change(folder, pa.array([], pa.binary()), (), ImageRoot(str(Path(images).absolute())))
    return index


def unit_rows(store: EmbeddingStore) -> Iterator[Embedded]:
    """All rows of a store at unit length, with their items."""
    return ((unit(rows, str(store.folder)), items) for rows, items in store.batches())
