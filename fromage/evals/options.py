"""How an evaluation runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fromage.models.encode_files import Encoding


@dataclass(frozen=True)
class Options(Encoding):
    """How an evaluation runs; batches are of texts too.

    Attributes:
        clip: whether the frozen CLIP is evaluated as a baseline.
        features: folder of stored patches, for Octopus; what it lacks is added. None: nothing is stored.
    """

    clip: bool = True
    features: Path | None = None
