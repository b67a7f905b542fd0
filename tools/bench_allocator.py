"""What keeping freed memory is worth on this machine (fromage/allocator.py): time, system time and memory, in turns.

    python tools/bench_allocator.py
    python tools/bench_allocator.py --only features step --rounds 5

Each measurement is a process of its own, with glibc as it is and with what the command line tells it, in turns. Weights are
random. Seconds are those of the CPU, user's and system's, of the measured loop; memory is the most that was resident.

    features    a convolutional tower encodes photographs (EfficientNet-Lite2, 260 px, batch 32)
    vit         so does a transformer (ViT-B/32, batch 32)
    step        fast training steps (the preset cpu of bench_step, batch 32, stored features)
    embed       texts are embedded with [RET], 128 at a time
    generate    captions of 8 images, 24 tokens
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from own_process import allocated_as_asked, measured, tell, used

from fromage.config import FromageConfig
from fromage.io import write_json

WORDS = "a dog runs through the snow with a red ball in its mouth"


def encoder(name: str, repeats: int) -> Callable[[], Any]:
    """Encodes 32 images a call."""
    from fromage.models.vision.registry import load_vision

    tower = load_vision(name, random_weights=True)
    pixels = torch.randint(0, 256, (32, 3, *tower.image_size), dtype=torch.uint8)
    return lambda: [tower(pixels) for _ in range(repeats)]


def trainer(repeats: int) -> Callable[[], Any]:
    """Takes training steps of bench_step's preset cpu."""
    import bench_step

    from fromage.training.fast_step import fast_step

    preset = bench_step.PRESETS["cpu"]
    model = bench_step.build(preset, "cpu")
    optimizer = torch.optim.Adam(model.trained().values())
    batch = bench_step.make_batch(model, preset["batch"], 0, pixels=False)
    return lambda: [bench_step.one_step(fast_step, model, optimizer, batch, True) for _ in range(repeats)]


def talker(repeats: int, generating: bool) -> Callable[[], Any]:
    """Embeds texts, or captions images, with random weights of the toy's tokenizer and a wider model."""
    from transformers import OPTConfig, OPTForCausalLM

    from fromage.generation.generate import caption_images
    from fromage.models.fromage import Fromage
    from fromage.models.language_model import LanguageModel, load_tokenizer
    from fromage.models.vision.registry import load_vision

    tokenizer = load_tokenizer("toy")
    config = OPTConfig(vocab_size=tokenizer.vocab_size, num_hidden_layers=12, dropout=0.0)
    model = Fromage(LanguageModel(OPTForCausalLM(config), tokenizer, "random"), load_vision("toy"), FromageConfig()).eval()
    features = torch.randn(8, model.vision.width)
    if generating:
        return lambda: [caption_images(model, features, 24) for _ in range(repeats)]
    return lambda: [model.embed_text([WORDS] * 128) for _ in range(repeats)]


TASKS: dict[str, Callable[[], Callable[[], Any]]] = {
    "features": lambda: encoder("timm:efficientnet_lite2", 4),
    "vit": lambda: encoder("ViT-B-32", 6),
    "step": lambda: trainer(3),
    "embed": lambda: talker(4, generating=False),
    "generate": lambda: talker(2, generating=True),
}


def measure(task: str) -> dict[str, float]:
    """In this process, after a first round."""
    allocated_as_asked()
    torch.manual_seed(0)
    work = TASKS[task]()
    work()
    return used(work)


def main() -> None:
    """Read the command line; measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=list(TASKS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        tell(measure(args.measure))
        return
    found = {}
    print("| | CPU seconds: glibc's own | kept | ratio | of the system | kept | MB: glibc's own | kept |\n|" + "---|" * 8)
    for task in args.only:
        rounds = [[measured(__file__, task, plain=plain) for plain in (True, False)] for _ in range(args.rounds)]
        middle = [
            {what: statistics.median(turn[side][what] for turn in rounds) for what in ("seconds", "system", "resident")}
            for side in (0, 1)
        ]
        own, kept = middle
        found[task] = {"own": own, "kept": kept, "ratio": own["seconds"] / kept["seconds"]}
        cells = [f"{own['seconds']:.2f}", f"{kept['seconds']:.2f}", f"{found[task]['ratio']:.2f}", f"{own['system']:.2f}"]
        cells += [f"{kept['system']:.2f}", f"{own['resident'] / 1e6:.0f}", f"{kept['resident'] / 1e6:.0f}"]
        print(f"| {task} | {' | '.join(cells)} |", flush=True)
    if args.json:
        write_json(args.json, {"threads": torch.get_num_threads(), "tasks": found})


if __name__ == "__main__":
    main()
