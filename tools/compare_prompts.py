"""Where should </s> stand? Log-likelihood per token of the toy world's validation captions, for each form of prompt.

    python tools/compare_prompts.py runs/demo/k4/checkpoints/last.ckpt [--world runs/demo/world] [--limit 120]

A caption follows its image alone, after another image with its caption, and after another caption and its image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import auto_cli
from torch import Tensor

from fromage import load_model, score
from fromage.evals.caption_sets import read_caption_set
from fromage.models.prompts import START, Part, encode_images


def main(ckpt: str, world: Path = Path("runs/demo/world"), limit: int = 120) -> None:
    """Print the figures.

    Args:
        ckpt: checkpoint or folder of a model.
        world: folder of the toy world.
        limit: captions.
    """
    model = load_model(ckpt)
    folder = world / "coco"
    data = read_caption_set(folder / "annotations" / "captions_val2017.json", folder / "val2017")
    images = encode_images(model, data.images[: limit + 1])  # (N + 1, m)
    texts = [captions[0] for captions in data.captions[: limit + 1]]

    Context = Callable[[Tensor, Tensor, str], list[Part]]
    forms: dict[str, Context] = {
        "[</s>] [image]": lambda image, other, text: [START, image],
        "[image] [</s>]": lambda image, other, text: [image, START],
        "[other] [</s> text] [image]": lambda image, other, text: [other, START, text, image],
        "[other] [</s> text] [image] [</s>]": lambda image, other, text: [other, START, text, image, START],
        "[</s> text] [image]": lambda image, other, text: [START, text, image],
        "[</s> text] [image] [</s>]": lambda image, other, text: [START, text, image, START],
    }
    for name, form in forms.items():
        scores = [score(model, form(images[i], images[i + 1], texts[i + 1]), [texts[i]]) for i in range(len(texts) - 1)]
        total, tokens = (sum(float(row[at]) for row in scores) for at in (0, 1))
        print(f"{name:40} {total / tokens:7.3f} nats a token")


if __name__ == "__main__":
    auto_cli(main)
