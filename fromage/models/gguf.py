"""Language models in GGUF files, the format of llama.cpp: unpacked once into a folder as Hugging Face's models have it.

Transformers reads the file (packages gguf and accelerate) and dequantises its tensors. The folder lies in the user's cache,
named by the digest of the file. Weights are float16 there; a file of 4 bits has no finer ones.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fromage.distribution import pip_install
from fromage.errors import UserError, first_line, reason
from fromage.identity import FolderKind
from fromage.io import digest_of, fill_once
from fromage.models.frozen import require_weights
from fromage.places import cache_folder

log = logging.getLogger(__name__)
PREFIX, MAGIC = "gguf:", b"GGUF"
PACKAGES = ("gguf", "accelerate")  # those of the extra
UNPACKED = FolderKind(
    "gguf.json", "a model that was unpacked", again="remove it; it is unpacked again", keys=frozenset({"files"})
)


def unpacked(file: Path) -> Path:
    """The folder of a GGUF file's model; made where it is not there yet.

    Raises UserError for a file that is no GGUF, is damaged, lacks tensors, or holds what transformers does not know; without
    their packages; and for a folder in the cache that was changed.
    """
    folder = cache_folder() / "gguf" / _digest_of_gguf(file)[:16]
    if not folder.exists():
        log.info("unpacking %s into %s, once ...", file, folder)
        fill_once(folder, lambda new: unpack(file, new))
    UNPACKED.require_unchanged(folder)
    return folder


def check_packages(file: str | Path) -> None:
    """Raise UserError without the packages that transformers reads GGUF files with."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"{file}: a GGUF file needs the package {missing[0]}: {pip_install('gguf')}")


def unpack(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer into a folder. Raises UserError as unpacked does."""
    _digest_of_gguf(file)
    check_packages(file)
    disable_progress_bar()  # a hundred lines of it, in a file
    try:
        place: Any = file.parent, {"gguf_file": file.name}
        tokenizer: Any = AutoTokenizer.from_pretrained(place[0], **place[1])
        whole: Any = AutoModelForCausalLM.from_pretrained(
            place[0], dtype=torch.float32, output_loading_info=True, **place[1]
        )
        lm, found = whole
        require_weights(str(file), found["missing_keys"])
        lm.config.__dict__.pop("quantization_config", None)
        plain: Any = AutoModelForCausalLM.from_config(lm.config, dtype=torch.float16)  # a model that may be saved
        plain.load_state_dict(lm.state_dict())
        plain.generation_config = lm.generation_config
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{file}: a GGUF file that is damaged or of an architecture that transformers does not read "
            f"({first_line(error)}); fetch it again, or take the model's own folder"
        ) from error
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    UNPACKED.seal(folder, {})


def _digest_of_gguf(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            start = opened.read(len(MAGIC))
        if start != MAGIC:
            raise UserError(f"{file}: is no GGUF file; give one as {PREFIX}FILE, or the model's folder without {PREFIX}")
        return digest_of(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); give a GGUF file as {PREFIX}FILE") from error
