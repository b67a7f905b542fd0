"""Small files in the published formats, and readers of the toy world's."""

import json
import pickle
from pathlib import Path

from fromage.octopus.sources import Flickr30kEntities, RefCOCO


def coco(world: Path, **options) -> RefCOCO:
    folder = world / "refcoco"
    return RefCOCO(str(folder / "refs(unc).p"), str(folder / "instances.json"), str(folder / "images"), **options)


def entities(world: Path, kind=Flickr30kEntities, **options):
    return kind(str(world / "flickr30k_entities"), str(world / "refcoco/images"), **options)


def write(path: Path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def refs_of(path: Path, notes: list[dict], protocol: int = 2, **change) -> str:
    made = [
        {"ref_id": n, "ann_id": a["id"], "image_id": a["image_id"], "category_id": a["category_id"], "split": "val"}
        | {"sentences": [{"sent": f"thing {n}", "raw": "Thing", "tokens": ["thing"], "sent_id": n}], "sent_ids": [n]}
        | change
        for n, a in enumerate(notes)
    ]
    path.write_bytes(pickle.dumps(made, protocol))
    return str(path)
