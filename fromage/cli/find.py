"""Commands that find: images for words, and what is meant in an image."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fromage.cli.command import Result
from fromage.cli.evals import QUESTION
from fromage.cli.options import save_png
from fromage.config import AsLoaded
from fromage.errors import UserError

if TYPE_CHECKING:
    from fromage.octopus.answers import GroundedAnswer

TRAINED = "name the checkpoint of a training with model.mask_scale by --ckpt"
TOY = Path("runs/octopus")  # where the toy Octopus is trained, in one to two hours


def search(
    text: Sequence[str] = (), *, image: Sequence[str] = (), index: Path, images: Path | None = None,
    ckpt: str | None = None, images_per_ret: int = 5, where: str = "", png: Path | None = None, device: str = "auto",
    quantize: AsLoaded | None = None,
) -> Iterator[Result]:  # fmt: skip
    """Find images for texts, for images, or for both together; print them, and draw them.

    Args:
        text: what to look for; each text is a query, together with the images of --image
        image: an image in front of each text, or without text a query of its own: file or URL; may be repeated
        images: folder of the index's images, if it has moved or the index is from elsewhere
        ckpt: checkpoint, when it has moved since the index was built
        images_per_ret: images per query
        png: draw the images into this file
    """
    if not text and not image:
        raise UserError("search: give texts, or images with --image")
    from fromage.images.contact_sheet import TILE
    from fromage.images.open import open_image
    from fromage.retrieval.open_index import open_index
    from fromage.retrieval.queries import query_rows
    from fromage.retrieval.results import draw_hits, left_out, load_images

    opened = [open_image(path) for path in image]
    queries: list[Any] = [[*opened, words] for words in text] or list(opened)
    asked = [" ".join([*(f"@{path}" for path in image), words]) for words in text] or list(image)
    model, found_in = open_index(index, ckpt, device, images, quantize=quantize)
    if where:
        found_in.filter(where)
    rows = query_rows(model, queries)  # (B, q)
    found = found_in.search(rows, images_per_ret, where=where)
    if where and not any(found):
        warnings.warn(f"no image of the index fits {where}", stacklevel=2)
    for query, hits in zip(asked, found, strict=True):
        yield Result.of([query, *(hit.line() for hit in hits)], {"query": query, "hits": [hit.as_dict() for hit in hits]})
    if png:
        drawn = [
            load_images(found_in.beyond(row, hits, where=where), images_per_ret, TILE)
            for row, hits in zip(rows, found, strict=True)
        ]
        for note in (note for _, lost in drawn for note in left_out(lost)):
            warnings.warn(note, stacklevel=2)
        if not any(pairs for pairs, _ in drawn):
            raise UserError(f"nothing is drawn, since none of the images can be opened: {png} is not written; see --images")
        save_png(png, draw_hits(asked, [pairs for pairs, _ in drawn]))
        yield Result(f"drawn: {png}", {"drawn": str(png)})


def ground(
    image: str, text: str, *, ckpt: str | None = None, question: str = QUESTION, png: Path | None = None,
    top: int | None = None, mask: bool = False, max_new_tokens: int = 128, device: str = "auto",
) -> Result:  # fmt: skip
    """Point at what is meant in an image: print Octopus's answer with its boxes, and draw them.

    Args:
        image: the image, file or URL
        text: what is meant, or a whole question or sentence with its mark at the end
        ckpt: checkpoint of Octopus (default: the toy one, trained on first use)
        png: draw the boxes into this file
        mask: draw the masks of the boxes too, and write them into the JSON; of a model trained with model.mask_scale
    """
    from fromage.images.open import open_image
    from fromage.octopus.decoding import ground, instruction
    from fromage.octopus.drawing import draw_answer
    from fromage.octopus.model import load_octopus

    asked, opened = instruction(text, question), open_image(image)
    if mask and not ckpt:
        raise UserError(f"--mask: the toy Octopus has no masks; {TRAINED}")
    model = load_octopus(ckpt or _toy(), device)
    if mask and not model.masks:
        raise UserError(f"--mask: {ckpt} has no masks; {TRAINED}, or leave --mask out")
    (answer,) = ground(model, [(opened, asked)], max_new_tokens)
    told, page = as_json(answer, opened.size, mask), draw_answer(opened, answer, top, mask)
    lines = [asked, f"  {answer.text}", *_lines(told)]
    if png:
        save_png(png, page)
        lines.append(f"drawn: {png}")
    return Result.of(lines, {"image": image, "instruction": asked, **told, "checkpoint": model.fingerprint()}, page)


def _toy() -> str:
    from fromage.apps.octopus_demo import toy_checkpoint

    return str(toy_checkpoint(TOY))


def as_json(answer: GroundedAnswer, size: tuple[int, int], masks: bool = False) -> dict[str, Any]:
    """An answer about an image of that width and height, its boxes in pixels: left, top, right, bottom.

    candidates: all, the best first; an answer whose boxes are spelled has neither candidates nor scores. masks: each box
    pointed at has its mask, as COCO's run lengths.
    """
    from fromage.octopus.drawing import pixels
    from fromage.octopus.masks import at_size
    from fromage.octopus.segments import run_lengths

    def listed(boxes: list[Any]) -> list[dict[str, Any]]:
        return [{"box": [round(side, 1) for side in pixels(box, size)], "score": score} for box, score in boxes]

    told: dict[str, Any] = {"answer": answer.text, "words": answer.words, "boxes": listed(answer.pointed)}
    for entry, mask in zip(told["boxes"], answer.masks if masks else [], strict=False):
        entry["mask"] = run_lengths(at_size(mask, *size).numpy())
    return told | {"candidates": listed(list(answer.candidates)), "size": list(size)}


def _lines(told: dict[str, Any]) -> list[str]:
    covered = [f"  mask {sum(e['mask']['counts'][1::2])} pixels" if "mask" in e else "" for e in told["boxes"]]
    rows = [
        f"  {number}  left {left:.0f}  top {top:.0f}  right {right:.0f}  bottom {bottom:.0f}"
        for number, (left, top, right, bottom) in enumerate((entry["box"] for entry in told["boxes"]), 1)
    ]
    scores = ["" if entry["score"] is None else f"  score {entry['score']:.2f}" for entry in told["boxes"]]
    return ["".join(parts) for parts in zip(rows, scores, covered, strict=True)] or ["  points at nothing"]
