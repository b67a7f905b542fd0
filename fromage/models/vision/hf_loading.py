"""Loading models of transformers named `hf:FOLDER` or `hf:ORG/NAME`, and the part of them that reads images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel

from fromage.checkpoints.format import DTYPES
from fromage.checkpoints.hub import stay_offline_without_hub
from fromage.errors import UserError, first_line
from fromage.models.frozen import require_weights
from fromage.models.vision.base import quiet


def folder_of(name: str) -> str:
    """The folder or name on the hub of 'hf:...'. Raises UserError for a folder that holds no model of transformers."""
    where = name.removeprefix("hf:")
    if not Path(where).exists():
        stay_offline_without_hub()
    elif not (Path(where) / "config.json").is_file():
        raise UserError(f"vision tower {name}: no folder with a config.json of transformers; name another")
    return where


def read_config(name: str) -> Any:
    """The configuration of 'hf:...'. Raises UserError for one that is not there or that transformers does not know."""
    where = folder_of(name)
    try:
        with quiet():
            return AutoConfig.from_pretrained(where, trust_remote_code=False)
    except Exception as error:
        if not Path(where).exists():
            told = f"neither a folder nor within reach on the hub; where there is a network: hf download {where}"
            raise UserError(f"vision tower {name}: {told}") from error
        raise UserError(f"vision tower {name}: {_architecture(where)}; name another") from error


def _architecture(folder: str) -> str:
    try:
        kind = json.loads((Path(folder) / "config.json").read_bytes())["model_type"]
        return f"transformers knows no architecture {str(kind)[:40]!r}, or not these settings of it"
    except (ValueError, KeyError, TypeError):
        return "its config.json is damaged or is not of transformers"


def load_whole(name: str, dtype: str = "float32", random_weights: bool = False) -> Any:
    """The model of 'hf:...' that AutoModel loads, in eval mode, of CLIP and SigLIP with both towers.

    Raises UserError for an unknown architecture, and for weights that are missing, damaged, of another model, or neither on
    disk nor on the hub.
    """
    config = read_config(name)
    with quiet():
        try:
            if random_weights:
                return AutoModel.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False).eval()
            given: dict[str, Any] = {"config": config, "dtype": DTYPES[dtype], "output_loading_info": True}
            whole, found = AutoModel.from_pretrained(folder_of(name), trust_remote_code=False, **given)
        except Exception as error:
            told = f"no weights that fit it on disk or within reach ({first_line(error).rstrip(':')})"
            raise UserError(f"vision tower {name}: {told}; fetch it again, or name another") from error
    missing = found["missing_keys"]
    if missing and all(key.startswith("pooler.") for key in missing):
        whole.pooler = None  # trained as a classifier, which reads the class token
    else:
        require_weights(f"vision tower {name}", missing)
    return whole.eval()


def vision_part(name: str, whole: Any) -> Any:
    """The part of a model that reads images. Raises UserError for one without."""
    part = getattr(whole, "vision_model", whole)
    if not isinstance(part, nn.Module) or getattr(part, "main_input_name", None) != "pixel_values":
        kind = whole.config.model_type
        raise UserError(f"vision tower {name}: a model of type {kind} has no vision tower of its own; name one that has")
    return part
