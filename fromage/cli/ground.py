"""The verb that points at what is meant in an image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fromage.cli.verb import DEVICE, JSON, QUESTION, Verbs, natural, option, out_png, positive, save_json

if TYPE_CHECKING:
    from fromage.octopus.answers import Grounded

TOY = Path("runs/octopus")  # where the toy Octopus is trained, in minutes


def ground(args: argparse.Namespace) -> None:
    """Point at what is meant in an image: print the answer with its boxes, and draw them."""
    from fromage.apps.screen import Screen
    from fromage.images.codec import to_png
    from fromage.images.open import open_image
    from fromage.io import write_files
    from fromage.octopus.decoding import ground, instruction
    from fromage.octopus.drawing import draw_answer
    from fromage.octopus.module import load_octopus

    asked, image = instruction(args.text, args.question), open_image(args.image)
    model = load_octopus(args.ckpt or _toy(), args.device)
    (answer,) = ground(model, [(image, asked)], args.max_new_tokens)
    told, screen = as_json(answer, image.size), Screen()
    screen.line(asked)
    screen.line(f"  {answer.text}")
    for line in _lines(told):
        screen.line(line)
    if args.json:
        save_json(args.json, {"image": args.image, "instruction": asked, **told, "checkpoint": model.fingerprint()})
    page = draw_answer(image, answer, args.top)
    screen.image(page)
    if args.png:
        write_files(args.png.parent, {args.png.name: to_png(page)})
        screen.line(f"drawn: {args.png}")


def _toy() -> str:
    from fromage.apps.octopus_demo import toy_checkpoint

    return str(toy_checkpoint(TOY))


def as_json(answer: Grounded, size: tuple[int, int]) -> dict[str, Any]:
    """An answer about an image of that width and height, its boxes in pixels: left, top, right, bottom.

    candidates: all, the best first; of an answer whose boxes are spelled there are none, nor scores.
    """
    from fromage.octopus.drawing import pixels

    def listed(boxes: list[Any]) -> list[dict[str, Any]]:
        return [{"box": [round(side, 1) for side in pixels(box, size)], "score": score} for box, score in boxes]

    told = {"answer": answer.text, "words": answer.words, "boxes": listed(answer.pointed)}
    return told | {"candidates": listed(list(answer.candidates)), "size": list(size)}


def _lines(told: dict[str, Any]) -> list[str]:
    rows = [
        f"  {number}  left {left:.0f}  top {top:.0f}  right {right:.0f}  bottom {bottom:.0f}"
        for number, (left, top, right, bottom) in enumerate((entry["box"] for entry in told["boxes"]), 1)
    ]
    scores = ["" if entry["score"] is None else f"  score {entry['score']:.2f}" for entry in told["boxes"]]
    return [row + score for row, score in zip(rows, scores, strict=True)] or ["  points at nothing"]


VERBS: Verbs = {
    ("ground",): (
        ground,
        [
            option("image", help="the image, file or URL"),
            option("text", help="what is meant, or a whole question or sentence with its mark at the end"),
            option("--ckpt", help="checkpoint of Octopus; without it, the toy one, trained on first use"),
            QUESTION,
            option("--png", type=out_png, help="draw the boxes into this file"),
            JSON,
            option("--top", type=natural, default=5, help="other candidates drawn, at most"),
            option("--max-new-tokens", type=positive, default=128, help="length of the answer at most, tokens"),
            DEVICE,
        ],
    ),
}
