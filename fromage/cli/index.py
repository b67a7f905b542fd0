"""Commands of the image index: embed images, build an index of the embeddings, change it, describe it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fromage.cli.command import Result
from fromage.cli.options import check_free
from fromage.errors import UserError, first_few

if TYPE_CHECKING:
    from fromage.retrieval.ann import ANNIndex
    from fromage.retrieval.base import ImageIndex
    from fromage.retrieval.table_file import Table


@dataclass(kw_only=True)
class IndexTarget:
    """Where an index goes, and its kind."""

    out: Path
    kind: str | None = None
    milvus: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raise UserError where an index is already that may not be replaced, before a model is loaded."""
        check_free(self.out, self.overwrite, "index.json")


@dataclass(kw_only=True)
class Describing:
    """A table of metadata."""

    table: Path | None = None
    key: str | None = None

    def tables(self) -> list[Table]:
        """What it holds. Raises UserError where it cannot be read."""
        from fromage.retrieval.table_file import read_table

        if (self.table is None) != (self.key is None):
            raise UserError("--table and --key go together: a table, and its column that names the images")
        return [read_table(self.table, self.key)] if self.table and self.key else []


@dataclass(kw_only=True)
class Reading:
    """How images are read and embedded."""

    captions: Path | None = None
    batch_size: int = 64
    workers: int = 0
    device: str = "auto"

    def check(self, images: str) -> None:
        """Raise UserError for images and captions that cannot be had, before a model is loaded."""
        from fromage.data.image_source import find_images

        unread: Any = None  # images are only listed
        find_images(images, unread, self.captions)


def _told(index: ImageIndex, where: Path) -> Result:
    there = f", in Milvus at {index.about()['milvus']['uri']}" if "milvus" in index.about() else ""
    columns = f", {len(told)} column{'s' * (len(told) > 1)} of metadata" if (told := index.about().get("columns")) else ""
    text = f"index of {len(index)} images, {index.kind}{_recall(index.candidates)}{columns}{there} -> {where}"
    return Result(text, {"count": len(index), **index.about(), "out": str(where)})


def _recall(candidates: ANNIndex | None) -> str:
    if candidates is None:
        return ""
    texts = "" if candidates.text_recall is None else f" ({candidates.text_recall:.3f} for texts)"
    return f", recall@10 {candidates.recall:.3f}{texts} against flat"


def embed(
    *, ckpt: str, images: str, out: Path, reading: Reading, dtype: Literal["float32", "float16"] = "float32",
    ray: str | None = None, actors: int = 1, gpus: float | None = None,
) -> Result:  # fmt: skip
    """Embed images with a checkpoint; continues a run that was killed.

    Args:
        images: folder of images, or shards
        dtype: number type of the stored embeddings
        ray: run as a Ray job: on this machine, or on the cluster at this address
    """
    from fromage.models.fromage import load_model
    from fromage.processor import find_device
    from fromage.retrieval.embed_images import embed_images
    from fromage.retrieval.embed_ray import RayJob

    gpus = float(find_device(reading.device).startswith("cuda")) if gpus is None else gpus
    reading.check(images)
    job = RayJob(ray, actors=actors, gpus=gpus, readers=reading.workers) if ray else None
    model = load_model(ckpt, "cpu" if job else reading.device)
    store = embed_images(
        model,
        images,
        out,
        batch_size=reading.batch_size,
        workers=reading.workers,
        captions=reading.captions,
        checkpoint=ckpt,
        dtype=dtype,
        ray=job,
    )
    return Result(f"{len(store)} embeddings -> {out}", {"embeddings": len(store), "out": str(out)})


def build(
    *, embeddings: Path | None = None, images: str | None = None, ckpt: str | None = None, target: IndexTarget,
    reading: Reading, describing: Describing,
) -> Result:  # fmt: skip
    """Build an index of embeddings, or directly of images.

    Args:
        images: folder of images, or shards, to embed first
        ckpt: checkpoint for --images; with --embeddings, to measure the recall of their captions
    """
    if (images or reading.captions) if embeddings else not (images and ckpt):
        raise UserError("index build: give either --embeddings, or --images with --ckpt")
    from fromage.models.fromage import load_model
    from fromage.retrieval import build as index_builder
    from fromage.retrieval.embedding_store import EmbeddingStore

    tables = describing.tables()
    if embeddings:
        store = EmbeddingStore.open(embeddings)
        model = load_model(ckpt, reading.device) if ckpt else None
        index = index_builder.build(
            store,
            target.out,
            target.kind,
            model=model,
            milvus=target.milvus,
            overwrite=target.overwrite,
            tables=tables,
        )
    else:
        assert images and ckpt
        reading.check(images)
        index = index_builder.build_index(
            load_model(ckpt, reading.device),
            images,
            target.out,
            batch_size=reading.batch_size,
            workers=reading.workers,
            captions=reading.captions,
            checkpoint=ckpt,
            kind=target.kind,
            milvus=target.milvus,
            overwrite=target.overwrite,
            tables=tables,
        )
    return _told(index, target.out)


def add(index: Path, *, embeddings: Path, describing: Describing) -> Result:
    """Add embeddings to an index; images that it holds already stay as they are."""
    from fromage.retrieval import build as index_builder
    from fromage.retrieval.embedding_store import EmbeddingStore

    return _told(index_builder.add(index, EmbeddingStore.open(embeddings), describing.tables()), index)


def describe(index: Path, *, table: Path, key: str) -> Result:
    """Give an index the columns of a table as metadata, in place of its own; `fromage search --where` filters by them."""
    from fromage.retrieval import build as index_builder

    return _told(index_builder.describe(index, Describing(table=table, key=key).tables()), index)


def remove(index: Path, path: list[str]) -> Result:
    """Remove images from an index.

    Args:
        path: paths as `fromage search` prints them
    """
    from fromage.retrieval import build as index_builder

    return _told(index_builder.remove(index, path), index)


def merge(index: list[Path], *, target: IndexTarget) -> Result:
    """Merge indexes of the same checkpoint; of images at the same path the first counts."""
    from fromage.retrieval import build as index_builder

    made = index_builder.merge(index, target.out, target.kind, milvus=target.milvus, overwrite=target.overwrite)
    return _told(made, target.out)


def sync(index: Path, *, images: Path, ckpt: str | None = None, reading: Reading) -> Iterator[Result]:
    """Bring an index up to date with its folder of images: new, changed and deleted ones.

    Args:
        images: folder of the images
        ckpt: checkpoint, when it has moved since the index was built
    """
    from fromage.retrieval.open_index import model_of
    from fromage.retrieval.sync import sync as bring

    changed, done = bring(
        index,
        images,
        lambda: model_of(index, ckpt, reading.device),
        captions=reading.captions,
        checkpoint=ckpt,
        batch_size=reading.batch_size,
        workers=reading.workers,
    )
    yield Result(str(done), done._asdict())
    if done.broken:
        warnings.warn(f"{images}: {len(done.broken)} images are left out: {first_few(done.broken, '; ')}", stacklevel=2)
    yield _told(changed, index)


def trust(index: Path, *, images: Path | None = None) -> Iterator[Result]:
    """Believe what an index says as if it had been built here: where its images are, its Milvus, its FAISS file.

    Args:
        images: folder where its images are from now on (default: where it says)
    """
    from fromage.retrieval.build import trust as believe

    believed = believe(index, images)
    yield Result(f"images in {believed.root.path or '(as they are named)'}", {"root": believed.root.path})
    yield _told(believed, index)


def import_embeddings(source: list[Path], *, ckpt: str, images: Path | None = None, target: IndexTarget) -> Result:
    """Build an index of embeddings that others made: the authors' pickles, or a folder of clip-retrieval or autofaiss.

    Args:
        source: files of {'paths': [...], 'embeddings': array, or list of arrays or tensors}; or one folder
        images: folder that paths of files in them are relative to; no other file will be opened
    """
    from fromage.models.fromage import load_model
    from fromage.retrieval import build as index_builder

    built = index_builder.import_embeddings(
        lambda: load_model(ckpt),
        source,
        target.out,
        images=images,
        checkpoint=ckpt,
        kind=target.kind,
        milvus=target.milvus,
        overwrite=target.overwrite,
    )
    if said := built.missing().said(target.out, len(built), True):
        warnings.warn(said, stacklevel=2)
    return _told(built, target.out)


def info(index: Path, *, images: Path | None = None, check: bool = False) -> Result:
    """Print what an index is.

    Args:
        images: folder of its images, if it has moved or the index is from elsewhere
        check: compare the digests of all bytes
    """
    from fromage.retrieval.index_folder import MILVUS, check_files, read_about
    from fromage.retrieval.open_index import load_index
    from fromage.retrieval.trust import SEAL, is_sealed
    from fromage.retrieval.where import KINDS

    about = read_about(index)
    check_files(index, about, full=check)
    opened = load_index(index, images=images)
    missing, own = opened.missing(), is_sealed(about)
    size = sum(file["bytes"] for file in about.pop("files").values())
    if MILVUS in about:
        about |= {"count": len(opened)} | about.pop(MILVUS)
        sound = "Milvus answers, and the collection is there"
    else:
        about["bytes_per_image"] = round(size / about["count"])
        sound = "sizes and samples of the files are right; --check reads all"
        sound = "every byte is as it was written" if check else sound
    about[SEAL] = "yes" if own else "no"
    if left_out := about.pop("left_out", {}):
        about["left_out"] = len(left_out)
    if columns := about.get("columns"):
        about["columns"] = ", ".join(f"{name} ({KINDS.get(kind, kind)})" for name, kind in columns.items())
    about |= {"root": opened.root.path} if images or "root" in about else {}
    if said := missing.said(index, len(opened), own):
        warnings.warn(said, stacklevel=2)
    lines = [f"{name:18} {'not measured' if value is None else value}" for name, value in about.items()]
    return Result.of([*lines, sound], about)
