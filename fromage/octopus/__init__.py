"""Octopus: the lower layers of a language model recognise objects in parallel, the upper layers point at them.

A reconstruction of Zhao et al., "Octopus: A Multi-modal LLM with Parallel Recognition and Sequential Understanding",
NeurIPS 2024. No code was published: it is the paper's model where the paper speaks, and the rest is ours (docs/octopus.md).

Where to look:

    model               the two halves of the language model and the relay between them
    template, branches  the prompt; several prompts about one image in one row
    queries             the object queries: where they begin, and the tokens that point at them
    recognition         the DETR decoder: object queries -> boxes and scores; masks: the mask head, an option
    matching            Hungarian matching and the detection loss
    step                the training step; module: the three stages; planner: what they take
    decoding, answers   answers with boxes; metrics judges them
    sources, data       data sets in their published files, mixed; dataset: their images; collate: batches
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fromage.octopus.data import OctopusData as OctopusData
    from fromage.octopus.decoding import ground as ground
    from fromage.octopus.examples import Example as Example
    from fromage.octopus.model import Octopus as Octopus
    from fromage.octopus.model import load_octopus as load_octopus
    from fromage.octopus.module import OctopusModule as OctopusModule
    from fromage.octopus.sources import CocoObjects as CocoObjects
    from fromage.octopus.sources import Flickr30kEntities as Flickr30kEntities
    from fromage.octopus.sources import Flickr30kSpotting as Flickr30kSpotting
    from fromage.octopus.sources import Instructions as Instructions
    from fromage.octopus.sources import Pope as Pope
    from fromage.octopus.sources import RefCOCO as RefCOCO
    from fromage.octopus.sources import VisualGenome as VisualGenome

_MODULES = {
    "CocoObjects": "fromage.octopus.sources",
    "Example": "fromage.octopus.examples",
    "Flickr30kEntities": "fromage.octopus.sources",
    "Flickr30kSpotting": "fromage.octopus.sources",
    "Instructions": "fromage.octopus.sources",
    "Octopus": "fromage.octopus.model",
    "OctopusData": "fromage.octopus.data",
    "OctopusModule": "fromage.octopus.module",
    "Pope": "fromage.octopus.sources",
    "RefCOCO": "fromage.octopus.sources",
    "VisualGenome": "fromage.octopus.sources",
    "ground": "fromage.octopus.decoding",
    "load_octopus": "fromage.octopus.model",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
