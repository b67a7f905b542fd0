"""Commands that show the product: the toy world and its demo, and the tour on one's own photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fromage.cli.command import Result


def toy_make(*, out: Path, seed: int = 0, train: int = 8192, val: int = 1000, refs: int = 500) -> Result:
    """Write the toy world.

    Args:
        seed: seed of the scenes
        train: training pairs
        val: validation pairs, scenes never seen in training
        refs: images per split of the referring-expression data (RefCOCO and others)
    """
    from fromage.toy.world import make_world

    made = make_world(out, seed, train, val, refs=refs)
    counts = ", ".join(f"{count} {what}" for what, count in made["counts"].items())
    return Result(f"{'toy world' if made['made'] else 'the same toy world was there'}: {counts} -> {out}", made)


def toy_demo(*, out: Path = Path("runs/demo")) -> None:
    """Make a world, train on it, evaluate, index and search."""
    from fromage.apps.toy_demo import demo

    demo(out)


def photos(
    captions: Path, *, images: Path, out: Path = Path("runs/photos"), lm: str = "smollm2",
    vision: str = "efficientnet-lite2", val_fraction: float = 0.1, options: Sequence[str] = (),
) -> Result:  # fmt: skip
    """Train on captioned photographs: towers, features, training, evaluation, index.

    A pretrained pair is fetched, SmolLM2-135M and EfficientNet-Lite2. After a kill the same command goes on.

    Args:
        captions: caption file in COCO's format
        images: folder of its photographs
        lm: language model
        vision: vision tower
        val_fraction: share of the photographs that are held out
        options: a further option of `lightning fit`, as --options=--trainer.max_steps=100
    """
    from fromage.apps.photos import photos as tour

    report = tour(captions, images, out, lm, vision, options, val_fraction)
    recalls = ", ".join(f"{name} {value:.1f}" for name, value in report["fromage"].items())
    lines = [f"{report['held_out']} photographs held out, recall in %: {recalls}"]
    lines += [f"drawn: {out / 'captions.png'}, {out / 'searches.png'}; report: {out / 'report.json'}"]
    return Result.of([*lines, f"talk with them: fromage chat --index {out / 'index'}"], report)
