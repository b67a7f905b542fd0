"""Octopus: objects recognised in parallel in the lower layers of a language model, and pointed at from the upper ones.

A reconstruction of Zhao et al., "Octopus: A Multi-modal LLM with Parallel Recognition and Sequential Understanding",
NeurIPS 2024, of which no code was published: the abstract, figures and settings are theirs, the rest is ours.
"""

from __future__ import annotations

from fromage import on_first_use

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
__getattr__ = on_first_use(__name__, _PUBLIC)
