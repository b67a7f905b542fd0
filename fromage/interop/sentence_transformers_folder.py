"""The files with which sentence-transformers loads a folder of ours; they are written without that library."""

from __future__ import annotations

from pathlib import Path

from fromage.checkpoints.card import FROMAGE_LIMITS, write_card
from fromage.checkpoints.format import CARD, FROMAGE, LAYOUTS, Saved, write_folder
from fromage.distribution import DISTRIBUTION, pip_install
from fromage.errors import UserError
from fromage.io import as_json
from fromage.printable import printable

MODULES, CONFIG = "modules.json", "config_sentence_transformers.json"
ENCODER = "fromage.interop.sentence_transformers.FromageEncoder"


def write_sentence_transformers(saved: Saved, folder: str | Path, overwrite: bool = False) -> None:
    """Write a folder for SentenceTransformer(folder, trust_remote_code=True), and for Fromage.from_pretrained too.

    Raises UserError for a model without a retrieval space, and where write_folder does.
    """
    if saved.kind != FROMAGE:
        raise UserError(f"{saved.source}: {LAYOUTS[saved.kind].name} embeds no texts; give a checkpoint of FROMAGe")
    beside = {
        MODULES: as_json([{"idx": 0, "name": "0", "path": "", "type": ENCODER}]),
        CONFIG: as_json(
            {
                "model_type": "SentenceTransformer",
                "requirements": {DISTRIBUTION: ">=0.2", "sentence-transformers": ">=5.4"},
                "prompts": {"query": "", "document": ""},  # trained without words in front of captions
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            }
        ),
        CARD: printable(_card(saved), "\n").encode(),
    }
    write_folder(saved, folder, overwrite, beside)


def _card(saved: Saved) -> str:
    lm, vision, q = (saved.settings[name] for name in ("lm", "vision", "q"))
    front = """library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- fromage
- arxiv:2301.13823"""
    lead = f"""Embeds texts, images and interleaved lists of both in one space of {q} dimensions
([FROMAGe](https://arxiv.org/abs/2301.13823)). The towers are fetched by their names in config.json."""
    use = f"""It needs the package: {pip_install("sentence-transformers")}.

    from PIL import Image
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer("FOLDER OR NAME OF THIS", trust_remote_code=True)
    image = Image.open("star.png")
    model.encode(["a red star", image, ["like", image, "but blue"]])"""
    config = saved.settings | {"about": saved.about}
    return write_card(config, front, f"FROMAGe on {lm} and {vision}", lead, use, FROMAGE_LIMITS)
