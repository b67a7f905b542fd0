"""Octopus: objects recognised in parallel in the lower layers of a language model, and pointed at from the upper ones.

A reconstruction of Zhao et al., "Octopus: A Multi-modal LLM with Parallel Recognition and Sequential Understanding",
NeurIPS 2024, of which no code was published: the abstract, figures and settings are theirs, the rest is ours.
"""

from __future__ import annotations

from typing import Any

_PUBLIC = {
    "Example": "fromage.octopus.examples",
    "Flickr30kEntities": "fromage.octopus.sources",
    "Instructions": "fromage.octopus.sources",
    "Octopus": "fromage.octopus.model",
    "OctopusData": "fromage.octopus.data",
    "OctopusModule": "fromage.octopus.lightning_module",
    "Pope": "fromage.octopus.sources",
    "RefCOCO": "fromage.octopus.sources",
    "ground": "fromage.octopus.decoding",
    "load_octopus": "fromage.octopus.lightning_module",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import on first use, as fromage does."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fromage.octopus' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
