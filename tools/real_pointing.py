"""Octopus on real photographs: questions made of COCO's boxes, training on them, answers, drawn and judged.

    python tools/real_pointing.py --data FOLDER --out runs/coco_pointing

FOLDER holds coco_sample/ (instances_val2017_sample.json, val2017/*.jpg) and opt_tokenizer/ (OPT's vocab.json, merges.txt).
The towers have the real layouts at moderate size and random weights, so nothing is learned about the world: the figures,
on the training images, say only whether the path runs and begins to memorise them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from real_input import make_clip, make_opt

from fromage.cli.main import main as fromage
from fromage.octopus.boxes import reading_order, relative, spelled
from fromage.octopus.examples import Box


def questions(instances: dict[str, Any]) -> list[dict[str, Any]]:
    """COCO's instances in LLaVA's format: for each image and category there a question, answered by the boxes.

    Crowds are left out, and boxes without area.
    """
    names = {category["id"]: category["name"] for category in instances["categories"]}
    found: dict[int, dict[str, list[Box]]] = {image["id"]: {} for image in instances["images"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in instances["images"]}
    for note in (note for note in instances["annotations"] if not note["iscrowd"]):
        (x, y, w, h), image = note["bbox"], note["image_id"]
        if box := relative(x, y, x + w, y + h, *sizes[image]):
            found[image].setdefault(names[note["category_id"]], []).append(box)
    return [
        {"id": str(image["id"]), "image": image["file_name"], "conversations": turns}
        for image in instances["images"]
        if (turns := [turn for name, boxes in found[image["id"]].items() for turn in _turn(name, boxes)])
    ]


def _turn(name: str, boxes: list[Box]) -> list[dict[str, str]]:
    told = "".join(spelled(boxes[i]) for i in reading_order(boxes))
    return [{"from": "human", "value": f"<image>\nwhere are the {name}?"}, {"from": "gpt", "value": told}]


def run(data: Path, out: Path, steps: int, judged: int = 373) -> dict[str, Any]:
    """All of it; returns the report of `fromage eval instructions` on so many of the training questions, at most."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    make_opt(data / "opt_tokenizer", out / "opt")
    make_clip(out / "clip")
    coco, asked, checkpoint = data / "coco_sample", out / "where.json", out / "checkpoints" / "last.ckpt"
    listed = questions(json.loads((coco / "instances_val2017_sample.json").read_text()))
    asked.write_text(json.dumps(listed))
    images, photo = str(coco / "val2017"), str(coco / "val2017" / listed[0]["image"])
    source = {"class_path": "fromage.octopus.sources.Instructions", "init_args": {"file": str(asked), "images": images}}
    verbs = [
        ["fit", "--config", "octopus_coco_sample.yaml", f"--trainer.max_steps={steps}", f"--model.lm={out / 'opt'}",
         f"--model.vision=local-dir:{out / 'clip'}", f"--data.train={json.dumps([source])}",
         f"--data.features={out / 'patches'}", f"--trainer.logger.init_args.save_dir={out}",
         f"--trainer.callbacks.init_args.dirpath={checkpoint.parent}", "--overwrite"],
        ["ground", photo, listed[0]["conversations"][0]["value"].removeprefix("<image>\n"), "--ckpt", str(checkpoint),
         "--png", str(out / "answer.png"), "--json", str(out / "answer.json"), "--overwrite"],
        ["eval", "instructions", str(asked), "--images", images, "--ckpt", str(checkpoint),
         "--limit", str(judged), "--json", str(out / "report.json"), "--overwrite"],
    ]  # fmt: skip
    for words in verbs:
        print("\n$ fromage", *words, flush=True)
        if fromage(words):
            raise SystemExit(2)
    return json.loads((out / "report.json").read_text())


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/coco_pointing"))
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of 16 questions")
    args = parser.parse_args()
    run(args.data, args.out, args.steps)


if __name__ == "__main__":
    main()
