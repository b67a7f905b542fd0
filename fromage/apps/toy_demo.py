"""The tour of `make demo`: make a world, train FROMAGe on it, evaluate beside CLIP, index images, search them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fromage.apps.tours import CHECKPOINT, draw_searches, placed, timed
from fromage.checkpoints.format import GENERATION
from fromage.data.batches import Batch
from fromage.data.datamodule import CC3M
from fromage.data.features import store_features
from fromage.evals.retrieval import evaluate, evaluate_clip
from fromage.generation.generate import caption_images
from fromage.generation.options import Decoding
from fromage.generation.preset import Preset
from fromage.images.open import open_image
from fromage.io import write_json
from fromage.models.fromage import Fromage, load_model
from fromage.retrieval.build import build_index
from fromage.toy.scenes import Scene, names_colour_and_shape
from fromage.toy.world import make_world
from fromage.training.fit import run_lightning

K = 4  # input embeddings per image: with one, as in the paper, captions name fewer things rightly (docs/results.md)
INDEX = f"index_k{K}"
PARTS = {"world": 24, "features": 17, "train": 115, "evaluate": 7, "search": 4}  # seconds on two cores of an older EPYC
PRESET = Preset(  # what suits the model of the tour
    style="alone",  # each turn by itself: they were trained on captions alone
    decoding=Decoding(ret_bias=2.0, images_per_ret=4, end_at_image=True),
    name="toy FROMAGe",
    about="A toy, trained in minutes: it knows drawings of coloured shapes, and captions such as those below.",
    examples=(
        "a small red star at night.",
        "a purple heart on the grass.",
        "on the snow by day, a big yellow circle at the top.",
        "a small blue ring at the left and a big green square at the right.",
    ),
)


def conversation_index(out: Path) -> Path:
    """The index of a toy model to talk to: of the tour in the folder `out`, which is made first where there is none."""
    if not (out / INDEX).exists():
        print(f"no checkpoint is given: making the toy world and a model of it in {out}, two to three minutes", flush=True)
        demo(out)
    return out / INDEX


def demo(out: Path, pairs: int = 8192, scenes: int = 1000, options: Sequence[str] = ()) -> dict[str, Any]:
    """Run the tour into the folder `out`; returns and writes report.json, with recalls in percent and times in seconds.

    The model is trained with k = 4. It is evaluated in retrieval beside CLIP, judged by whether its captions name colour and
    shape, and its images are indexed and searched.

    Args:
        pairs: training pairs of the world.
        scenes: validation scenes, never seen in training.
        options: further words for `lightning fit --config toy.yaml`.
    """
    began = time.monotonic()
    world, stored = out / "world", out / "features"
    seconds: dict[str, float] = {}
    with timed("world", seconds, PARTS):
        make_world(world, train=pairs, val=scenes)
    with timed("features", seconds, PARTS):
        store_features(str(world / "cc3m" / "train"), stored, Fromage.load().vision)
    with timed("train", seconds, PARTS):
        checkpoint = train(out / f"k{K}", K, world, stored, options)
    with timed("evaluate", seconds, PARTS):
        model = load_model(checkpoint)
        report = compare(model, world) | {"captions_right": name_things(model, world)}
    with timed("search", seconds, PARTS):
        coco = world / "coco"
        captions = coco / "annotations" / "captions_val2017.json"
        index = build_index(
            model, str(coco / "val2017"), out / INDEX, captions=captions, checkpoint=checkpoint, overwrite=True
        )
        asked = queries(json.loads(captions.read_text()))
        draw_searches(model, index, asked, out / "searches.png")
    report["seconds"] = {**{k: round(v, 1) for k, v in seconds.items()}, "after_install": round(time.monotonic() - began, 1)}
    write_json(out / "report.json", report)
    print(table(report), f"report: {out / 'report.json'}\nsearches: {out / 'searches.png'}", sep="\n")
    return report


def train(out: Path, k: int, world: Path, stored: Path, options: Sequence[str]) -> Path:
    """`lightning fit` with k places per image, from the start; returns the last checkpoint. A former one is replaced."""
    words = [f"--data.train_shards={stored}", f"--data.val_shards={world / 'cc3m' / 'val'}", f"--model.k={k}"]
    run_lightning(["fit", "--config", "toy.yaml", *words, *placed(out), *options])
    checkpoint = out / CHECKPOINT
    write_json(checkpoint.with_name(GENERATION), PRESET.stored())
    return checkpoint


def queries(coco: dict[str, Any]) -> list[str]:
    """The last captions of the first unseen scenes of one, two and three objects, and of another one."""
    said = {note["image_id"]: note["caption"] for note in coco["annotations"]}
    by_count: dict[int, list[str]] = {1: [], 2: [], 3: []}
    for image in coco["images"]:
        by_count[len(Scene.parse(image["scene"]).things)].append(said[image["id"]])
    return [*by_count[1][:2], *by_count[2][:1], *by_count[3][:1]]


def compare(model: Fromage, world: Path) -> dict[str, Any]:
    """Recalls of FROMAGe and of CLIP's own towers over the world's validation scenes, one caption each."""
    data = CC3M(str(world / "cc3m" / "train"), str(world / "cc3m" / "val"), batch_size=250, max_tokens=40, workers=0)
    data.attach(model.vision.transform, model.tokenizer)
    batches: list[Batch] = list(data.val_dataloader())  # type: ignore[arg-type]
    gallery = sum(len(batch.keys) for batch in batches)
    return {"fromage": evaluate(model, batches), "clip": evaluate_clip(model, batches), "gallery": gallery}


def name_things(model: Fromage, world: Path) -> float:
    """Share, in percent, of unseen scenes of one object whose greedy caption names its colour and shape, and no others."""
    listed = json.loads((world / "coco" / "annotations" / "captions_val2017.json").read_text())["images"]
    single = [(entry["file_name"], Scene.parse(entry["scene"])) for entry in listed if "+" not in entry["scene"]]
    pixels = [model.vision.transform(open_image(str(world / "coco" / "val2017" / name))) for name, _ in single]
    made = caption_images(model, model.vision(torch.stack(pixels)))
    return round(
        100 * sum(names_colour_and_shape(text, scene) for text, (_, scene) in zip(made, single, strict=True)) / len(single),
        1,
    )


def table(report: dict[str, Any]) -> str:
    """The report as lines for the terminal."""
    names = [f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)]
    lines = [
        "",
        f"{report['gallery']} unseen scenes, one caption each; recall in %",
        "        " + "".join(f"{n:>9}" for n in names),
    ]
    lines += [f"{who:8}" + "".join(f"{report[who][name]:9.1f}" for name in names) for who in ("fromage", "clip")]
    lines.append(f"greedy captions that name colour and shape of a single object: {report['captions_right']:.0f} %")
    lines.append("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in report["seconds"].items()))
    return "\n".join(lines)
