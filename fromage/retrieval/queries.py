"""Queries: prompts and images -> unit rows of the retrieval space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fromage.models.fromage import Fromage
from fromage.models.prompts import (
    RET,
    START,
    ImageInput,
    Part,
    Prompt,
    Starts,
    encode_images,
    joined,
    listed,
    parts_of,
    started,
)


@torch.no_grad()
def embed_queries(model: Fromage, queries: Sequence[Prompt]) -> Tensor:
    """Queries -> (B, q) unit rows: an image alone as it is embedded in an index, all else with [RET] after it."""
    queries = listed(queries)
    rows = torch.empty(len(queries), model.q, device=model.device)  # (B, q)
    parts = [joined(parts_of(query)) for query in queries]
    alone = [i for i, query in enumerate(parts) if _is_image(query)]
    others = [i for i in range(len(parts)) if i not in alone]
    if alone:
        rows[alone] = model.embed_images(encode_images(model, [parts[i][0] for i in alone]))  # type: ignore[misc]
    if others:
        rows[others] = model.embed_text([parts[i] for i in others])
    return rows


def query_rows(model: Fromage, queries: Sequence[Prompt]) -> np.ndarray:
    """As embed_queries, in the form that ImageIndex.search takes: (B, q) float32 in NumPy."""
    return embed_queries(model, queries).float().cpu().numpy()


def _is_image(parts: Sequence[Part]) -> bool:
    """Whether a query is an image alone."""
    return len(parts) == 1 and isinstance(parts[0], ImageInput)


IMAGE = "(image)"


def read_as(model: Fromage, query: Prompt) -> str:
    """How embed_queries reads a query, in words: '(image) </s> but at night [RET]'; nothing is opened.

    Without [RET] where the state at the last word before it embeds a text.
    """
    parts = joined(parts_of(query))
    if _is_image(parts):
        return f"{IMAGE}, compared as the index has it"
    start = model.tokenizer.hf.decode(model.tokenizer.start())
    whole = started(joined([*parts, RET]), Starts.ONCE, model.start_first)
    read = whole[:-1] if model.pools_last_word else whole
    return " ".join(filter(None, (_spelled(part, start) for part in read)))


def _spelled(part: Part, start: str) -> str:
    if isinstance(part, ImageInput):
        return IMAGE
    return start if part is START else RET.value if part is RET else str(part).strip()
