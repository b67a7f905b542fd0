"""Verbs of the image index: embed images, build an index of the embeddings, change it, look at it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fromage.cli.verb import DEVICE, OUT, Verbs, natural, option, positive, share
from fromage.errors import UserError

if TYPE_CHECKING:
    from fromage.retrieval.ann import ANNIndex
    from fromage.retrieval.base import ImageIndex
    from fromage.retrieval.embed_ray import RayJob


def _tell(index: ImageIndex, where: Path) -> None:
    there = f", in Milvus at {index.about()['milvus']['uri']}" if "milvus" in index.about() else ""
    print(f"index of {len(index)} images, {index.kind}{_recall(index.candidates)}{there} -> {where}")


def _recall(candidates: ANNIndex | None) -> str:
    if candidates is None:
        return ""
    texts = "" if candidates.text_recall is None else f" ({candidates.text_recall:.3f} for texts)"
    return f", recall@10 {candidates.recall:.3f}{texts} against flat"


def embed(args: argparse.Namespace) -> None:
    """Embed images with a checkpoint; takes up a run that was killed."""
    from fromage.models.fromage import load_model
    from fromage.retrieval.embed_images import embed_images

    job = _ray_job(args)
    model = load_model(args.ckpt, "cpu" if job else args.device)
    how = args.batch_size, args.workers, args.captions, args.ckpt, args.dtype, job
    print(f"{len(embed_images(model, args.images, args.out, *how))} embeddings -> {args.out}")


def _ray_job(args: argparse.Namespace) -> RayJob | None:
    from fromage.retrieval.embed_ray import RayJob

    if not args.ray:
        return None
    gpus = args.gpus if args.gpus is not None else float(args.device.startswith("cuda"))
    return RayJob(args.ray, args.actors, gpus, args.workers)


def build(args: argparse.Namespace) -> None:
    """Build an index of embeddings, or of images at once."""
    from fromage.models.fromage import load_model
    from fromage.retrieval import build as index_builder
    from fromage.retrieval.embedding_store import EmbeddingStore

    if (args.images or args.captions) if args.embeddings else not (args.images and args.ckpt):
        raise UserError("index build: give either --embeddings, or --images with --ckpt")
    if args.embeddings:
        store = EmbeddingStore.open(args.embeddings)
        model = load_model(args.ckpt, args.device) if args.ckpt else None
        index = index_builder.build(store, args.out, args.kind, model, args.milvus)
    else:
        how = args.batch_size, args.workers, args.captions, args.ckpt, args.kind, args.milvus
        index = index_builder.build_index(load_model(args.ckpt, args.device), args.images, args.out, *how)
    _tell(index, args.out)


def add(args: argparse.Namespace) -> None:
    """Add embeddings to an index; images that are there already are left as they are."""
    from fromage.retrieval import build as index_builder
    from fromage.retrieval.embedding_store import EmbeddingStore

    _tell(index_builder.add(args.index, EmbeddingStore.open(args.embeddings)), args.index)


def remove(args: argparse.Namespace) -> None:
    """Remove images from an index."""
    from fromage.retrieval import build as index_builder

    _tell(index_builder.remove(args.index, args.path), args.index)


def merge(args: argparse.Namespace) -> None:
    """Merge indexes of the same checkpoint; of images at the same path the first counts."""
    from fromage.retrieval import build as index_builder

    _tell(index_builder.merge(args.index, args.out, args.kind, args.milvus), args.out)


def import_authors(args: argparse.Namespace) -> None:
    """Build an index of the authors' embeddings pickles, which hold URLs in place of paths."""
    from fromage.models.fromage import load_model
    from fromage.retrieval.authors_embeddings import rows_of
    from fromage.retrieval.build import write_index
    from fromage.retrieval.embed_images import located

    model = load_model(args.ckpt)
    of = model.q, model.fingerprint(), located(args.ckpt)
    _tell(write_index(args.out, rows_of(args.pickle, model.q), *of, args.kind, milvus=args.milvus), args.out)


def info(args: argparse.Namespace) -> None:
    """Print what an index is."""
    from fromage.retrieval.index_folder import MILVUS, check_files, read_about
    from fromage.retrieval.open_index import load_index

    about = read_about(args.index)
    check_files(args.index, about, full=args.check)
    size = sum(file["bytes"] for file in about.pop("files").values())
    if MILVUS in about:
        about |= {"count": len(load_index(args.index))} | about.pop(MILVUS)
        sound = "Milvus answers, and the collection is there"
    else:
        about["bytes_per_image"] = round(size / about["count"])
        sound = "sizes and samples of the files are right; --check reads all"
        sound = "every byte is as it was written" if args.check else sound
    for name, value in about.items():
        print(f"{name:18} {'not measured' if value is None else value}")
    print(sound)


CKPT = option("--ckpt", type=Path, required=True, help="checkpoint of `lightning fit`, folder or hub name")
CAPTIONS = option("--captions", type=Path, help="COCO caption JSON, or {file name: caption}, for a folder")
BATCH_SIZE = option("--batch-size", type=positive, default=64, help="images per batch")
WORKERS = option("--workers", type=natural, default=0, help="processes that decode images")
KIND = option("--kind", help="flat, or a FAISS factory string such as IVF4096,SQ8 (flat up to a million images)")
MILVUS = option(
    "--milvus", help="build in Milvus: its address, or a path that ends in .db; --kind is then flat, HNSW,M=32 ..."
)
INDEX = option("index", type=Path, help="folder of the index")
EMBEDDINGS = option("--embeddings", type=Path, required=True, help="folder of `fromage index embed`")

VERBS: Verbs = {
    ("index", "embed"): (
        embed,
        [
            CKPT,
            option("--images", required=True, help="folder of images, or shards"),
            OUT,
            CAPTIONS,
            BATCH_SIZE,
            WORKERS,
            option("--dtype", choices=("float32", "float16"), default="float32", help="of the stored embeddings"),
            DEVICE,
            option(
                "--ray", nargs="?", const="local", metavar="ADDRESS", help="as a Ray job: here, or on the cluster at auto"
            ),
            option("--actors", type=positive, default=1, help="with --ray: copies of the image tower"),
            option("--gpus", type=share, help="with --ray: GPUs of each of these, also 0.5 (1 with --device cuda, else 0)"),
        ],
    ),
    ("index", "build"): (
        build,
        [
            option("--embeddings", type=Path, help="folder of `fromage index embed`"),
            option("--images", help="folder of images, or shards, to embed first"),
            option("--ckpt", type=Path, help="checkpoint of --images; or of --embeddings, to measure with their captions"),
            OUT,
            KIND,
            MILVUS,
            CAPTIONS,
            BATCH_SIZE,
            WORKERS,
            DEVICE,
        ],
    ),
    ("index", "add"): (add, [INDEX, EMBEDDINGS]),
    ("index", "remove"): (remove, [INDEX, option("path", nargs="+", help="paths as `fromage search` prints them")]),
    ("index", "merge"): (merge, [option("index", type=Path, nargs="+", help="folders of indexes"), OUT, KIND, MILVUS]),
    ("index", "import"): (
        import_authors,
        [option("pickle", type=Path, nargs="+", help="{'paths': [...], 'embeddings': array}"), CKPT, OUT, KIND, MILVUS],
    ),
    ("index", "info"): (
        info,
        [INDEX, option("--check", action="store_true", help="compare the digests of all bytes")],
    ),
}
