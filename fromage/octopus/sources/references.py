"""Files of references, as refs(unc).p of RefCOCO: read, and the images that they hold out of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from fromage.checkpoints.safe_pickle import load_plain
from fromage.data.annotations import TEXT, WHOLE, Schema, fitting
from fromage.errors import UserError

SPLIT: Schema = {"image_id": WHOLE, "split": TEXT}  # all that is asked of a reference that is held out


def read_refs(path: Path) -> Any:
    """What refs(unc).p or the like holds, unchecked. Raises UserError for a file that is missing or no plain pickle."""
    try:
        return load_plain(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name refs(unc).p or the like") from error
    except Exception as error:  # a broken pickle can raise nearly anything
        cause = f" ({error})" if isinstance(error, UnpicklingError) else ", or damaged"
        raise UserError(f"{path}: is not a list of references{cause}; download it again") from error


def held_out(files: Sequence[str]) -> set[int]:
    """The COCO ids of the images in all splits but train of refs(unc).p and the like. Raises UserError as read_refs does."""
    refs = [ref for path in map(Path, files) for ref in fitting(path, "references", read_refs(path), SPLIT)]
    return {ref["image_id"] for ref in refs if ref["split"] != "train"}
