"""Queries: prompts and images -> unit rows of the retrieval space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fromage.models.fromage import Fromage
from fromage.models.prompts import ImageInput, Prompt, encode_images, joined, listed, parts_of


@torch.no_grad()
def embed_queries(model: Fromage, queries: Sequence[Prompt]) -> Tensor:
    """Queries -> (B, q) unit rows: an image alone as it is embedded in an index, all else with [RET] behind it."""
    queries = listed(queries)
    rows = torch.empty(len(queries), model.q, device=model.device)  # (B, q)
    parts = [joined(parts_of(query)) for query in queries]
    alone = [i for i, query in enumerate(parts) if len(query) == 1 and isinstance(query[0], ImageInput)]
    others = [i for i in range(len(parts)) if i not in alone]
    if alone:
        rows[alone] = model.embed_images(encode_images(model, [parts[i][0] for i in alone]))  # type: ignore[misc]
    if others:
        rows[others] = model.embed_text([parts[i] for i in others])
    return rows
