"""The tour of `make photos`: FROMAGe on one's own captioned photographs, with a pretrained pair of towers, on two cores.

Each part leaves its result in the folder and is not done again: after a kill, the same command goes on.
"""

from __future__ import annotations

import glob
import hashlib
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fromage.apps.tours import CHECKPOINT, draw_searches, once, placed, timed
from fromage.checkpoints.format import GENERATION
from fromage.checkpoints.run_folder import last_checkpoint
from fromage.data.annotation_formats import read_coco_captions
from fromage.data.batches import Batch
from fromage.data.broken import Broken, read_shards
from fromage.data.caption_files import Skipped
from fromage.data.datamodule import CC3M
from fromage.data.features import store_features
from fromage.data.packing import is_packed, pack_coco
from fromage.data.sample_images import from_npy
from fromage.data.shard_names import expand
from fromage.data.shard_sizes import shard_sizes, sized
from fromage.data.shards import captions_of, image_file
from fromage.errors import UserError
from fromage.evals.retrieval import evaluate
from fromage.generation.generate import caption_images
from fromage.generation.options import Decoding
from fromage.generation.preset import Preset
from fromage.identity import FolderKind
from fromage.images.codec import decode_image, to_png
from fromage.images.contact_sheet import contact_sheet
from fromage.io import as_json, digest_of, write_files, write_json
from fromage.models.fromage import Fromage, load_model
from fromage.models.prompts import RET, prompt_length
from fromage.models.towers import get, is_own
from fromage.models.vision.registry import load_vision
from fromage.retrieval.build import build_index
from fromage.retrieval.open_index import load_index, open_index
from fromage.training.config_options import options_of
from fromage.training.configs import find_config
from fromage.training.fit import run_lightning

if TYPE_CHECKING:
    from PIL import Image

ELSEWHERE = "name another folder: --out"
FORMER = frozenset({"captions", "images", "val_fraction"})  # what a tour of an earlier version says beside its towers
TOUR = FolderKind("photos.json", "a tour", of="pair of towers", remedy=ELSEWHERE, again=ELSEWHERE, ignored=FORMER)
SOURCE = FolderKind("source.json", "shards", of="source", remedy=ELSEWHERE, again=ELSEWHERE)
CONFIG = "photos.yaml"
HELD_OUT = 0.1  # share of the photographs that are not trained on
SHOWN, SEARCHES = 12, 5  # captioned photographs, and searches, that are drawn
# It has seen captions alone, of one sentence each.
PRESET = Preset(style="alone", decoding=Decoding(images_per_ret=4, end_at_image=True, stop=(".", "\n")))


def photos(
    captions: Path,
    images: Path,
    out: Path,
    lm: str = "smollm2",
    vision: str = "efficientnet-lite2",
    options: Sequence[str] = (),
    val_fraction: float = HELD_OUT,
) -> dict[str, Any]:
    """Fetch towers, pack, encode, train, evaluate on photographs held out, and index; returns what report.json holds.

    Args:
        captions: caption file in COCO's format.
        images: folder of its photographs.
        lm, vision: towers; those that fromage.models.towers keeps are fetched.
        options: further words for `lightning fit --config photos.yaml`; without any, a run that came to its end will do.
        val_fraction: share of the photographs, between 0 and 1, that are held out.

    Raises:
        UserError: a tower is out of reach, the file or its images cannot be read, nothing is held out, or the folder is of
            another tour.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction}: photographs held out judge the model; give a share, as {HELD_OUT}")
    _take_up(out, {"lm": lm, "vision": vision})
    seconds: dict[str, float] = {}
    with timed("towers", seconds):
        for name in filter(is_own, (lm, vision)):
            get(name)
    shards, stored = out / "shards", out / "features"
    with timed("shards", seconds):
        source = source_of(captions, images)
        if is_packed(shards):
            noted = SOURCE.read(shards)
            if "val_fraction" not in noted:
                raise SOURCE.unreadable(shards, "of an earlier version")
            SOURCE.compare(shards, noted, (source or noted) | {"val_fraction": val_fraction})
            if not source:
                print(f"{captions} or {images} is not there: going on with what was packed from them")
        else:
            source |= {"val_fraction": val_fraction}
            write_files(shards, {SOURCE.file: as_json(source)})
            print(pack_coco(captions, images, shards, val_fraction=val_fraction, overwrite=True).text())
    with timed("features", seconds):
        tower = load_vision(vision)
        for part in ("train", "val"):
            store_features(str(shards / part), stored / part, tower, batch_size=32, keep_images=True)
    with timed("train", seconds):
        words = [f"--model.lm={lm}", f"--model.vision={vision}"]
        words += [f"--data.{part}_shards={stored / part}" for part in ("train", "val")]
        photographs = sum(size or 0 for size in shard_sizes(expand(str(stored / "train"))))
        if photographs < options_of(find_config(CONFIG))["batch_size"]:
            words.append(f"--data.batch_size={photographs}")
        checkpoint = train(out, words, options or None)
    with timed("evaluate", seconds):
        model = load_model(checkpoint)
        data = CC3M(str(stored / "train"), str(stored / "val"), batch_size=100, max_tokens=32, workers=0)
        data.attach(tower.transform, model.tokenizer)
        batches: list[Batch] = list(data.val_dataloader())  # type: ignore[arg-type]
        held_out = sum(len(batch.keys) for batch in batches)
        report: dict[str, Any] = {"held_out": held_out, "fromage": evaluate(model, batches)}
        write_json(out / "report.json", report)
        write_files(out, {"captions.png": to_png(draw_captions(model, stored / "val"))})
    with timed("index", seconds):
        there = (out / "index").exists()
        if not there or load_index(out / "index").fingerprint != model.fingerprint():  # of a run that was removed
            encoded = str(Path(glob.escape(str(stored)), "*", "*.tar"))
            build_index(model, encoded, out / "index", checkpoint=checkpoint, overwrite=there)
        most = model.lm.max_length or math.inf
        asked = [text for text in batches[0].captions if prompt_length(model, [text, RET]) <= most][:SEARCHES]
        model, index = open_index(out / "index")
        draw_searches(model, index, asked, out / "searches.png")
    report["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    write_json(out / "report.json", report)
    return report


def _take_up(out: Path, towers: dict[str, str]) -> None:
    """Begin a tour in a folder, or go on with the one that is there. Raises UserError where it is of other towers, or none.

    Without a checkpoint no tower is trained on, so a name may be corrected.
    """
    if (out / TOUR.file).exists():
        about = TOUR.read(out)
        if not about.keys() >= towers.keys() or about.keys() - towers.keys() - FORMER:
            raise TOUR.something_else(out)
        if not last_checkpoint((out / "run" / CHECKPOINT).parent):
            write_files(out, {TOUR.file: as_json(towers)})
    TOUR.begin(out, towers)


def source_of(captions: Path, images: Path) -> dict[str, Any]:
    """Digests of the captions, and of paths and sizes of the photographs they name; {} where one of the two is missing.

    Other files in the folder count for nothing. Raises UserError where the captions are not in COCO's format.
    """
    if not captions.is_file() or not images.is_dir():
        return {}
    named = {*read_coco_captions(captions, Skipped().skip).files.values()}
    files = sorted((name, size) for name in named if (size := _size(images / name)) is not None)
    listed = hashlib.sha256(repr(files).encode("utf-8", "surrogatepass")).hexdigest()
    return {"captions": digest_of(captions)[:16], "photographs": listed[:16]}


def _size(file: Path) -> int | None:
    """Bytes of a file; None where it is none."""
    try:
        return file.stat().st_size if file.is_file() else None
    except OSError:  # a name that is too long, say
        return None


def train(out: Path, words: Sequence[str], options: Sequence[str] | None = None) -> Path:
    """`lightning fit`, unless it came to its end before; what was killed goes on. Returns the checkpoint.

    words, options: of `lightning fit`; options as of `once`.
    """
    run = out / "run"

    def fit(again: list[str]) -> None:
        run_lightning(["fit", "--config", CONFIG, *placed(run), *words, *(options or ()), *again])
        write_json((run / CHECKPOINT).with_name(GENERATION), PRESET.stored())

    return once(run, options, fit)  # not written again: `fromage tune-ret` adds to it


def draw_captions(model: Fromage, features: Path) -> Image.Image:
    """The first photographs of shards of features, each with a caption of people and the model's."""
    listed = expand(str(features))
    rows = list(islice(read_shards(sized(listed), Broken(1.0)), SHOWN))
    made = caption_images(model, torch.stack([from_npy(raw["npy"]).float() for raw in rows]))
    shown = [(decode_image(image_file(raw)), f"{text}\n{captions_of(raw)[0]}") for raw, text in zip(rows, made, strict=True)]
    return contact_sheet([("captions of photographs that were held out; in grey, a person's", shown)])
