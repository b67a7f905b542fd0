"""How cost grows with size, on the toy towers: four charts, and the figures in them as JSON.

    python tools/draw_growth.py --out docs/growth

captions.svg    seconds of a training step by captions in a batch, fast and the authors' computation, stored features
rows.svg        milliseconds of a search for one query by rows of the index, of each kind
prompt.svg      milliseconds to an answer's first token, and of each further token, by words in the prompt
images.svg      milliseconds to the first token by images in the prompt, which are encoded first

Each point is the median of some rounds, in which sizes and sides take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from bench_step import make_batch
from gpu_kit import commit
from PIL import Image
from study import begin, machine

from fromage.data.image_source import Item
from fromage.generation.generate import generate
from fromage.generation.options import Decoding
from fromage.images.line_chart import line_chart
from fromage.models.fromage import Fromage
from fromage.retrieval.faiss_index import FaissIndex
from fromage.training.fast_step import fast_step
from fromage.training.reference_step import reference_step

CAPTIONS, WORDS, IMAGES = (8, 16, 32, 64, 128), (8, 32, 64, 128, 256), (1, 2, 4, 8, 16)
ROWS, KINDS, WIDTH = (1_000, 10_000, 50_000, 100_000), ("flat", "IVF64,Flat"), 256
TOKENS = 16  # of an answer, beyond the first
Sides = dict[str, dict[int, Callable[[], Any]]]  # by name and size, what is timed
Lines = dict[str, list[tuple[float, float]]]
CHARTS = {
    "captions": ("A training step", "captions per batch", "seconds"),
    "rows": ("A search for one query", "rows of the index", "ms"),
    "prompt": ("An answer, by the length of the prompt", "words", "ms"),
    "images": ("An answer's first token, by images in the prompt", "images", "ms"),
}


def measure(sides: Sides, rounds: int, factor: float = 1.0) -> Lines:
    """The median time of each side and size; the first round warms up."""
    seconds: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name, sizes in sides.items()}
    for turn in range(rounds + 1):
        for name, sizes in sides.items():
            for size, work in sizes.items():
                began = perf_counter()
                work()
                seconds[name][size] += [perf_counter() - began] if turn else []
    return {
        name: [(size, round(factor * statistics.median(some), 5)) for size, some in sizes.items()]
        for name, sizes in seconds.items()
    }


def of_captions(model: Fromage, rounds: int) -> Lines:
    """Seconds of a step, forward and backward."""
    batches = {size: make_batch(model, size, size, pixels=False) for size in CAPTIONS}

    def step(run: Any, size: int) -> None:
        run(model, batches[size], False).loss.backward()
        model.zero_grad()

    sides = {"fast": fast_step, "authors'": reference_step}
    return measure({name: {size: partial(step, run, size) for size in CAPTIONS} for name, run in sides.items()}, rounds)


def of_rows(fingerprint: str, rounds: int) -> Lines:
    """Milliseconds of a search, the ten best."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((max(ROWS), WIDTH)).astype("f4")
    items = [Item(f"{i}.jpg") for i in range(max(ROWS))]
    indexes = {kind: {n: FaissIndex.build(rows[:n], items[:n], fingerprint, kind=kind) for n in ROWS} for kind in KINDS}
    asked = rng.standard_normal((1, WIDTH)).astype("f4")
    sides: Sides = {
        kind: {n: partial(index.search, asked, 10) for n, index in made.items()} for kind, made in indexes.items()
    }
    return measure(sides, 10 * rounds, 1000)


def of_prompts(model: Fromage, rounds: int) -> tuple[Lines, Lines]:
    """Milliseconds of an answer: by the words of the prompt, and by its images."""
    one, more = (Decoding(n, min_new_tokens=n, max_images=0) for n in (1, 1 + TOKENS))
    pixels = np.random.default_rng(0).integers(0, 256, (max(IMAGES), 96, 96, 3), dtype=np.uint8)  # no image twice
    texts = {n: " ".join(["star"] * n) for n in WORDS}
    shown: dict[int, list[Any]] = {n: [*map(Image.fromarray, pixels[:n]), "a star"] for n in IMAGES}

    def answer(prompt: Any, decoding: Decoding) -> None:
        generate(model, [prompt], decoding)

    asked = {"first token": one, "answer": more}
    sides: Sides = {name: {n: partial(answer, [text], d) for n, text in texts.items()} for name, d in asked.items()}
    found = measure(sides, rounds, 1000)
    both = zip(found["answer"], found["first token"], strict=True)
    by_words = {
        "first token": found["first token"],
        "each further token": [(n, round((whole - first) / TOKENS, 3)) for (n, whole), (_, first) in both],
    }
    return by_words, measure({"first token": {n: partial(answer, prompt, one) for n, prompt in shown.items()}}, rounds, 1000)


def main(words: list[str] | None = None) -> None:
    """Read the command line, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the charts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(words)
    begin(args.threads)
    at = commit()  # before the charts are written, which may be tracked
    model = Fromage.load()
    by_words, by_images = of_prompts(model, args.rounds)
    charts = {
        "captions": of_captions(model, args.rounds),
        "rows": of_rows(model.fingerprint(), args.rounds),
        "prompt": by_words,
        "images": by_images,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, lines in charts.items():
        title, x, y = CHARTS[name]
        (args.out / f"{name}.svg").write_text(line_chart(lines, title, x, y), encoding="utf-8")
        for side, points in lines.items():
            print(f"{title}, {side}, {y} by {x}: " + ", ".join(f"{size:g} {value:g}" for size, value in points))
    told = {"commit": at, "machine": machine(), "torch": torch.__version__, **charts}
    (args.out / "figures.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
