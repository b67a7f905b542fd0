"""Opening a saved index, of whatever kind, and the model that built it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fromage.errors import UserError
from fromage.models.fromage import Fromage, load_model
from fromage.models.prompts import Prompt
from fromage.retrieval.faiss_index import ImageIndex
from fromage.retrieval.queries import embed_queries
from fromage.retrieval.results import Hit


def open_index(folder: str | Path, ckpt: str | Path | None = None, device: str = "cpu") -> tuple[Fromage, ImageIndex]:
    """The model an index was built with, and the index. ckpt: where the model is now, if not where it was then."""
    index = ImageIndex.load(folder, None)
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
    if not queries:
        return []
    return index.search(embed_queries(model, queries).float().cpu().numpy(), k)  # (B, q)
