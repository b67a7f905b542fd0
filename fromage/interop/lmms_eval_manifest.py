"""What lmms-eval reads at its start, by the entry point of setup.cfg: the model's name and where its class is."""

from __future__ import annotations

from typing import Any

MODEL, CLASS = "fromage", "fromage.interop.lmms_eval.FromageLmms"


def manifest() -> Any:
    """lmms-eval's manifest. PyTorch is not imported for it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, simple_class_path=CLASS)
