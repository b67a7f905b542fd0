"""Which class of model a checkpoint is of, for commands that take any."""

from __future__ import annotations

from typing import Any


def model_class(kind: str) -> Any:
    """Fromage or Octopus, by what fromage.checkpoints.format calls it."""
    from fromage.models.fromage import Fromage
    from fromage.octopus.model import Octopus

    return {cls.kind: cls for cls in (Fromage, Octopus)}[kind]


def load_any(ckpt: str, device: str, **options: Any) -> Any:
    """The model of a checkpoint, folder or hub name, of whichever kind it is. options: as of from_pretrained."""
    from fromage.checkpoints.load import read_saved
    from fromage.models.pretrained import from_saved

    saved = read_saved(ckpt)
    return from_saved(model_class(saved.kind), saved, device, **options)
