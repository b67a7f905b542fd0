"""What a new image index is to be: its width, model, kind, place and metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fromage.retrieval.image_root import ImageAccess
from fromage.retrieval.table_file import Table

if TYPE_CHECKING:
    from fromage.retrieval.ann import ANNIndex

FLAT = "flat"  # the kind that compares a query with every row


@dataclass(frozen=True)
class IndexSpec:
    """What a new index is to be.

    Attributes:
        width: q.
        fingerprint: of the model that embedded the rows; checkpoint is where it lies, if that is known.
        kind: a name that the backend knows; None chooses by the number of rows.
        trained: candidates of the kind, which hold the first of the rows or none.
        texts: (n, q) unit rows that texts ask with, to measure an approximate kind with.
        milvus: where the rows go in place of this disk, see fromage.retrieval.milvus_client; kind is then one of Milvus.
        overwrite: an index that is there may be replaced.
        place: where the images are, and whether they may be opened; without a root it is the deepest folder that holds them.
        tables: metadata of the images; of several tables with an image the first counts.
    """

    width: int
    fingerprint: str
    checkpoint: str = ""
    kind: str | None = None
    trained: ANNIndex | None = None
    texts: np.ndarray | None = None
    milvus: str = ""
    overwrite: bool = False
    place: ImageAccess = field(default_factory=ImageAccess)
    tables: Sequence[Table] = ()
