"""Images with several captions each: COCO's own files, and Karpathy's splits of COCO and Flickr30k."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fromage.data.annotation_formats import coco_captions, read_annotations
from fromage.data.annotations import FILE, TEXT, Schema, fitting, optional
from fromage.errors import UserError
from fromage.images.regions import below

Dataset = Literal["coco", "flickr30k"]
CAPTIONS = 5  # of an image, in all the published protocols; COCO has a sixth and seventh for a few
SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
FILES = {"coco": "captions_val2017.json, or dataset_coco.json of Karpathy's splits", "flickr30k": "dataset_flickr30k.json"}
KINDS = {
    "coco": ("captions of COCO", "Karpathy's split of COCO"),
    "flickr30k": ("Karpathy's split of Flickr30k",),
}

KARPATHY: Schema = {"filename": FILE, "filepath": optional(TEXT), "split": TEXT, "sentences": [{"raw": TEXT}]}


class Numbers(NamedTuple):
    """COCO's numbers of images, and of their captions, one after the other."""

    images: list[int]
    texts: list[int]


@dataclass(frozen=True)
class CaptionSet:
    """Images and their captions; captions[i] belong to images[i].

    Attributes:
        name: file and split.
        dataset: whose published figures a report shows.
        dropped: what else the file holds, by cause.
        numbers: of images and captions, where their matches beyond these are counted (fromage.evals.eccv).
    """

    name: str
    images: list[Path]
    captions: list[list[str]]
    dataset: Dataset = "coco"
    dropped: dict[str, int] = field(default_factory=dict)
    numbers: Numbers | None = None


def read_caption_set(
    annotations: Path,
    images: Path,
    dataset: Dataset = "coco",
    split: str = "test",
    limit: int | None = None,
) -> CaptionSet:
    """The images of a caption file, in its order, with at most five captions each.

    Args:
        annotations: COCO's captions_*.json, or Karpathy's dataset_coco.json or dataset_flickr30k.json.
        images: the folder that file names are relative to; for Karpathy's COCO the one that holds val2014, or that itself.
        split: of Karpathy's files: train (with restval), val or test.
        limit: images at most; None for all.

    Raises:
        UserError: the file is missing, broken or of another data set, or has no image in the split.
    """
    kind, content = read_annotations(annotations, KINDS[dataset], FILES[dataset])
    name, listed = _coco(annotations, content) if kind == "captions of COCO" else _karpathy(annotations, content, split)
    pairs = [(file, [text for raw in texts if (text := raw.strip())]) for file, texts in listed]
    good = [(file, texts) for file, texts in pairs if texts][:limit]
    if not good:
        raise UserError(f"{annotations}: holds no image with a caption in the split {split}; choose another split or file")
    return CaptionSet(
        f"{annotations.name}, {name}",
        [below(images, file) for file, _ in good],
        [texts[:CAPTIONS] for _, texts in good],
        dataset,
        {
            "images without a caption": sum(not texts for _, texts in pairs),
            "captions beyond the fifth": sum(max(0, len(texts) - CAPTIONS) for _, texts in good),
        },
    )


def _coco(path: Path, content: dict[str, Any]) -> tuple[str, list[tuple[str, list[str]]]]:
    files, captions = coco_captions(path, content)
    return "all images", [(file, captions[key]) for key, file in files.items()]


def _karpathy(path: Path, content: dict[str, Any], split: str) -> tuple[str, list[tuple[str, list[str]]]]:
    if split not in SPLITS:
        raise UserError(f"split {split}: there are {', '.join(SPLITS)}")
    return f"split {split}", [
        ("/".join(filter(None, (image.get("filepath"), image["filename"]))), [s["raw"] for s in image["sentences"]])
        for image in fitting(path, "images", content["images"], KARPATHY)
        if image["split"] in SPLITS[split]
    ]
