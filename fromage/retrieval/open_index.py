"""Opening a saved index, of whatever kind, and the model that built it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fromage.errors import UserError
from fromage.models.fromage import Fromage, load_model
from fromage.models.prompts import Prompt, listed
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.image_root import ImageAccess, ImageRoot, common_root
from fromage.retrieval.index_folder import INDEX, MILVUS, read_about
from fromage.retrieval.milvus_index import MilvusIndex
from fromage.retrieval.queries import query_rows
from fromage.retrieval.results import Hit
from fromage.retrieval.trust import is_sealed

BACKENDS: dict[str, type[ImageIndex]] = {"faiss": FaissIndex, "milvus": MilvusIndex}  # by the name in index.json


def backend_of(about: dict[str, Any]) -> str:
    """Name of the backend that an index.json is of; those of former versions do not say it."""
    return about.get("backend", "milvus" if MILVUS in about else "faiss")


def load_index(folder: str | Path, fingerprint: str | None = None, images: str | Path | None = None) -> ImageIndex:
    """Open a saved index of any backend.

    Args:
        fingerprint: of the model that must have built it; None for any.
        images: the folder of its images, where they are now; they are opened within it alone. None for where they were.

    Raises UserError if it is damaged or out of reach, or if another model built it.
    """
    folder = Path(folder).resolve()
    about = read_about(folder)
    name = backend_of(about)
    if name not in BACKENDS:
        raise INDEX.unreadable(folder, f"backend {name!r} is none of {', '.join(BACKENDS)}")
    if images is not None and not Path(images).is_dir():
        raise UserError(f"{images}: is no folder; name the folder of the images of {folder}")
    place = place_of(folder, about, images)
    index = BACKENDS[name].open(folder, about, place)
    if images is not None and not about.get("root") and (former := common_root(index.paths().chunks)):
        index.set_place(replace(place, root=replace(index.root, former=former)))  # absolute paths, of a former version
    if fingerprint is not None:
        index.require(fingerprint, folder)
    return index


def place_of(folder: Path, about: dict[str, Any], images: str | Path | None = None) -> ImageAccess:
    """Where the images of an index are: where the user says, else where an index that was built here says.

    Those of an index from elsewhere are opened in its own folder alone, unless the user names another.
    """
    own, confined, left_out = is_sealed(about), bool(about.get("confined")), about.get("left_out", {})
    if images is not None:
        where = str(Path(images).absolute())
        return ImageAccess(ImageRoot(where), own, confined, where, left_out)
    root = ImageRoot(about.get("root", ""))
    within = (root.path if own else "") or str(folder) if confined or not own else None
    return ImageAccess(root, own, confined, within, left_out)


def open_index(
    folder: str | Path,
    ckpt: str | Path | None = None,
    device: str = "cpu",
    images: str | Path | None = None,
    **options: Any,
) -> tuple[Fromage, ImageIndex]:
    """The model an index was built with, and the index, which knows the model. A warning counts images that are missing.

    Args:
        ckpt: where the model is now, if not where it was then.
        images: where the images are now, as for load_index.
        options: further ones of load_model, such as quantize.
    """
    index = load_index(folder, images=images)
    checkpoint = _checkpoint(folder, index.checkpoint, ckpt, index.place.own)
    if said := index.missing().said(folder, len(index), index.place.own):
        warnings.warn(said, stacklevel=2)
    model = load_model(checkpoint, device, **options)
    index.require(model.fingerprint(), folder)
    index.model = model
    return model, index


def model_of(folder: str | Path, ckpt: str | Path | None = None, device: str = "cpu") -> Fromage:
    """The model an index was built with. ckpt: where it is now, if not where it was then."""
    about = read_about(Path(folder))
    return load_model(_checkpoint(folder, about["checkpoint"], ckpt, is_sealed(about)), device)


def _checkpoint(folder: str | Path, known: str, ckpt: str | Path | None, own: bool) -> str | Path:
    """Where the model of an index is. Raises UserError where that is not known, or is a stranger's name on the hub."""
    if not ckpt and not own and known and not Path(known).is_absolute():
        raise UserError(f"{folder}: was not built here, so the checkpoint that it names is not fetched; give --ckpt {known}")
    if not ckpt and (not known or (Path(known).is_absolute() and not Path(known).exists())):  # else a name on the hub
        raise UserError(f"{folder}: its checkpoint is not at {known or '(not on record)'}; give it with --ckpt")
    return ckpt or known


def search_index(
    model: Fromage, index: ImageIndex, queries: Sequence[Prompt] | Prompt, k: int = 5, where: str = ""
) -> list[list[Hit]]:
    """The k images nearest to each query: a text, an image, or a list of both. A text or image alone is one query.

    where: a filter over the metadata, as for ImageIndex.search.

    Raises UserError for the index of another model.
    """
    index.require_model(model)
    if not (queries := listed(queries)):
        return []
    return index.search(query_rows(model, queries), k, where=where)
