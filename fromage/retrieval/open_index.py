"""Opening a saved index, of whatever kind, and the model that built it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fromage.errors import UserError
from fromage.models.fromage import Fromage, load_model
from fromage.models.prompts import Prompt, listed
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.index_folder import INDEX, MILVUS, read_about
from fromage.retrieval.milvus_index import MilvusIndex
from fromage.retrieval.queries import embed_queries
from fromage.retrieval.results import Hit

BACKENDS: dict[str, type[ImageIndex]] = {"faiss": FaissIndex, "milvus": MilvusIndex}  # by the name in index.json


def backend_of(about: dict[str, Any]) -> str:
    """Name of the backend that an index.json is of; those of former versions do not say it."""
    return about.get("backend", "milvus" if MILVUS in about else "faiss")


def load_index(folder: str | Path, fingerprint: str | None = None) -> ImageIndex:
    """Open a saved index of any backend.

    Raises UserError if it is damaged or out of reach, or if another model than fingerprint (None: any) built it.
    """
    folder = Path(folder).resolve()
    about = read_about(folder)
    name = backend_of(about)
    if name not in BACKENDS:
        raise INDEX.unreadable(folder, f"backend {name!r} is none of {', '.join(BACKENDS)}")
    index = BACKENDS[name].open(folder, about)
    if fingerprint is not None:
        index.require(fingerprint, folder)
    return index


def open_index(folder: str | Path, ckpt: str | Path | None = None, device: str = "cpu") -> tuple[Fromage, ImageIndex]:
    """The model an index was built with, and the index. ckpt: where the model is now, if not where it was then."""
    index = load_index(folder)
    where = Path(index.checkpoint)
    if not ckpt and (not index.checkpoint or (where.is_absolute() and not where.exists())):  # else a name on the hub
        raise UserError(f"{folder}: its checkpoint is not at {index.checkpoint or '(not on record)'}; give it with --ckpt")
    model = load_model(ckpt or index.checkpoint, device)
    index.require(model.fingerprint(), folder)
    return model, index


def search_index(model: Fromage, index: ImageIndex, queries: Sequence[Prompt], k: int = 5) -> list[list[Hit]]:
    """The k images nearest to each query: a text, an image, or a list of both.

    Raises UserError for the index of another model.
    """
    index.require_model(model)
    if not (queries := listed(queries)):
        return []
    return index.search(embed_queries(model, queries).float().cpu().numpy(), k)  # (B, q)
