"""The path of photographs, each part beside a plain way of it: features per second, training steps, memory.

    python tools/bench_photos.py --images FOLDER_OF_JPEGS --threads 2

The pair is SmolLM2-135M and EfficientNet-Lite2, as `fromage towers get` fetches them. The plain loop over photographs is
timm's: its transform, a DataLoader over the files, batches of 32 through the model. Ours is what `fromage features` does.
Both have one process that decodes; the plain loop gives freed memory back to the system, as a plain program does. Training
steps have stored features; the reference step is that of the released code. Each measurement is a process of its own, in
turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from own_process import allocated_as_asked, measured, tell, used

from fromage.io import write_json
from fromage.training.meter import Meter

VISION, LM, BATCH, STEPS = "efficientnet-lite2", "smollm2", 64, 3
CAPTIONS = 5  # of a photograph, as a plain loop over pairs of image and caption encodes it


def photographs(images: Path, limit: int) -> list[Path]:
    """The first JPEGs of a folder."""
    return sorted(images.glob("*.jpg"))[:limit]


def plain_features(files: list[Path]) -> Callable[[], Any]:
    """timm's transform and model in a loop."""
    import timm
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config
    from torch.utils.data import DataLoader, Dataset

    from fromage.models.towers import folder_of

    model = timm.create_model(f"local-dir:{folder_of(VISION)}", pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)

    class Files(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, number: int) -> torch.Tensor:
            return transform(Image.open(files[number]).convert("RGB"))  # type: ignore[operator]

    @torch.inference_mode()
    def work() -> None:
        torch.cat([model(batch) for batch in DataLoader(Files(), batch_size=32, num_workers=1)])

    return work


def our_features(files: list[Path]) -> Callable[[], Any]:
    """Shards of the photographs, which stand before, to shards of features."""
    from fromage.data.features import store_features
    from fromage.data.shard_writer import write_shards
    from fromage.models.vision.registry import load_vision

    folder, tower = Path(tempfile.mkdtemp()), load_vision(VISION)
    write_shards(((f"{i:08d}", file.read_bytes(), "a", {}) for i, file in enumerate(files)), folder / "shards")

    def work() -> None:
        stored = store_features(str(folder / "shards"), folder / f"{time.monotonic_ns()}", tower, 32, workers=1)
        if stored < len(files):
            raise SystemExit(f"{stored} of {len(files)} photographs could be read; both rates are of all of them")

    return work


def steps(kind: str, dtype: str) -> Callable[..., Any]:
    """So many whole training steps of random captions of real lengths."""
    import bench_step

    from fromage.models.fromage import Fromage
    from fromage.training.fast_step import fast_step
    from fromage.training.reference_step import reference_step

    model = Fromage.load(LM, VISION, dtype=dtype)
    optimizer = torch.optim.Adam(model.trained().values())
    batches = [bench_step.make_batch(model, BATCH, seed, pixels=False) for seed in range(STEPS)]
    step = {"fast": fast_step, "reference": reference_step}[kind]

    def work(count: int = STEPS) -> None:
        for i, batch in enumerate(batches[:count]):
            bench_step.one_step(step, model, optimizer, batch, i % 2 == 0)

    return work


def measure(task: str, words: list[str], images: Path, limit: int) -> dict[str, float]:
    """In this process: wall-clock seconds for each example, and bytes; of training steps, FLOP for each example too."""
    allocated_as_asked()
    files = photographs(images, limit)
    work = {"plain": plain_features, "ours": our_features}[words[0]](files) if task == "features" else steps(*words)
    if task == "steps":
        work()  # the features' first round would be half of the measurement
    began = time.perf_counter()
    found = used(work)
    examples = len(files) if task == "features" else STEPS * BATCH
    found["each"] = (time.perf_counter() - began) / examples
    if task == "steps":
        meter = Meter([])
        meter.run("step", lambda: work(1))
        found["flop"] = meter.flop / BATCH
    return found


def main() -> None:
    """Read the command line; measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEGs")
    parser.add_argument("--limit", type=int, default=384, help="photographs that are encoded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        tell(measure(args.measure[0], args.measure[1:], args.images, args.limit))
        return
    given = ("--images", str(args.images), "--limit", str(args.limit), "--threads", str(args.threads))
    sides = {"features": ["plain", "ours"], "steps": ["reference", "fast"]}
    from fromage.checkpoints.format import dtype_name

    kinds = [("features", []), *(("steps", [dtype]) for dtype in dict.fromkeys(("float32", dtype_name("auto"))))]
    found = {}
    print("| | plain, examples per second | ours | ratio | plain, MB resident | ours |\n|---|---|---|---|---|---|")
    for task, more in kinds:
        rounds = [
            [measured(__file__, task, side, *more, *given, plain=side == "plain") for side in sides[task]]
            for _ in range(args.rounds)
        ]
        name = " ".join([task, *more])
        plain, ours = (
            {what: statistics.median(turn[i][what] for turn in rounds) for what in ("each", "resident")} for i in (0, 1)
        )
        found[name] = {"plain": plain, "ours": ours, "ratio": plain["each"] / ours["each"]}
        cells = [f"{1 / plain['each']:.1f}", f"{1 / ours['each']:.1f}", f"{found[name]['ratio']:.2f}"]
        cells += [f"{side['resident'] / 1e6:.0f}" for side in (plain, ours)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        if task == "steps":
            work = [rounds[0][i]["flop"] / 1e9 for i in (0, 1)]
            told = (
                f"A step's matrix products: {work[0]:.2f} and {work[1]:.2f} GFLOP an example, {work[0] / work[1]:.2f} times"
            )
            found[name]["gflop"] = dict(zip(("plain", "ours"), work, strict=True))
    print(f"\n{told}.")
    print(f"A photograph of {CAPTIONS} captions is encoded once: over pairs the first ratio is {CAPTIONS} times as large.")
    if args.json:
        write_json(args.json, {"threads": args.threads, "found": found})


if __name__ == "__main__":
    main()
