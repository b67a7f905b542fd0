"""Commands that find: images for words, and what is meant in an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fromage.cli.evals import QUESTION
from fromage.cli.options import save_json, save_png
from fromage.errors import UserError

if TYPE_CHECKING:
    from fromage.octopus.answers import Grounded

TOY = Path("runs/octopus")  # where the toy Octopus is trained, in minutes


def search(
    text: Sequence[str] = (), *, image: Sequence[str] = (), index: Path, ckpt: Path | None = None, k: int = 5,
    png: Path | None = None, device: str = "cpu",
) -> None:  # fmt: skip
    """Print the images found for each text or image, and draw them.

    Args:
        text: what to look for; several texts make several rows
        image: an image to look for, file or URL; may be repeated
        ckpt: checkpoint, when it has moved since the index was built
        png: draw the images into this file
    """
    import numpy as np

    from fromage.apps.screen import Screen
    from fromage.images.open import open_image
    from fromage.retrieval.embed_images import embed_opened
    from fromage.retrieval.open_index import open_index
    from fromage.retrieval.results import draw_hits, left_out, load_images

    if not text and not image:
        raise UserError("search: give texts, or images with --image")
    images = [open_image(path) for path in image]
    model, opened = open_index(index, ckpt, device)
    queries = np.concatenate([model.embed_text(text).float().cpu().numpy(), embed_opened(model, images)])  # (B, q)
    asked, hits = [*text, *image], opened.search(queries, k)
    screen = Screen()
    for query, found in zip(asked, hits, strict=True):
        screen.line(query)
        for hit in found:
            screen.line(hit.line())
    if png:
        drawn = [load_images(opened.beyond(query, found), k) for query, found in zip(queries, hits, strict=True)]
        for note in (note for _, lost in drawn for note in left_out(lost)):
            screen.complain(note)
        save_png(png, draw_hits(asked, [pairs for pairs, _ in drawn]))
        screen.line(f"drawn: {png}")


def ground(
    image: str, text: str, *, ckpt: str | None = None, question: str = QUESTION, png: Path | None = None,
    json: Path | None = None, top: int = 5, max_new_tokens: int = 128, device: str = "cpu",
) -> None:  # fmt: skip
    """Point at what is meant in an image: print Octopus's answer with its boxes, and draw them.

    Args:
        image: the image, file or URL
        text: what is meant, or a whole question or sentence with its mark at the end
        ckpt: checkpoint of Octopus (default: the toy one, trained on first use)
        png: draw the boxes into this file
    """
    from fromage.apps.screen import Screen
    from fromage.images.open import open_image
    from fromage.octopus.decoding import ground, instruction
    from fromage.octopus.drawing import draw_answer
    from fromage.octopus.module import load_octopus

    asked, opened = instruction(text, question), open_image(image)
    model = load_octopus(ckpt or _toy(), device)
    (answer,) = ground(model, [(opened, asked)], max_new_tokens)
    told, screen = as_json(answer, opened.size), Screen()
    for line in (asked, f"  {answer.text}", *_lines(told)):
        screen.line(line)
    save_json(json, {"image": image, "instruction": asked, **told, "checkpoint": model.fingerprint()})
    page = draw_answer(opened, answer, top)
    screen.image(page)
    if png:
        save_png(png, page)
        screen.line(f"drawn: {png}")


def _toy() -> str:
    from fromage.apps.octopus_demo import toy_checkpoint

    return str(toy_checkpoint(TOY))


def as_json(answer: Grounded, size: tuple[int, int]) -> dict[str, Any]:
    """An answer about an image of that width and height, its boxes in pixels: left, top, right, bottom.

    candidates: all, the best first; an answer whose boxes are spelled has neither candidates nor scores.
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
