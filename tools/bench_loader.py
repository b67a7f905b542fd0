"""Time the loader on photographs of real size: decode, preprocess and tokenise, per core, beside plainer ways, interleaved.

    python tools/bench_loader.py val2017                       # a folder of JPEGs
    python tools/bench_loader.py val2017 --shorter 256         # as tools/make_cc3m_shards.py stores them

Each way goes through the same photographs in one process of one thread and is counted in the seconds of CPU it used; they
take turns every half second, so that other work on the machine disturbs all of them alike. The plain loader is what
torchvision and open_clip come with: ImageFolder, whose files need no unpacking and have no captions, and CLIP's own
transform. Pillow alone decodes and does nothing more.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from fromage.data.datamodule import CC3M
from fromage.data.shard_writer import write_shards
from fromage.data.tokenizer import PromptTokenizer
from fromage.images.codec import decode_image, is_image
from fromage.images.transforms import JpegDecoding, halves
from fromage.io import write_json
from fromage.models.language_model import load_tokenizer

STEP, PAIRS = 0.2, 180  # seconds and pairs of a step that the loader is to keep up with
WORDS = ("a", "the", "two", "man", "dog", "street", "table", "red", "old", "sitting", "holding", "near", "with", "on", "of")


def scaled(data: bytes, shorter: int) -> bytes:
    """A JPEG whose shorter side has so many pixels, whatever it had."""
    image, out = decode_image(data), io.BytesIO()
    ratio = shorter / min(image.size)
    size = round(image.width * ratio), round(image.height * ratio)
    image.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=95)
    return out.getvalue()


def make_shards(photographs: list[bytes], out: Path) -> None:
    """The photographs, each with a caption of ten words, as COCO's have."""
    rng = random.Random(0)
    write_shards(((f"{i:08d}", data, " ".join(rng.choices(WORDS, k=10)), {}) for i, data in enumerate(photographs)), out)


def ours(shards: Path, transform: Any, tokenizer: PromptTokenizer, decoding: JpegDecoding, batch: int) -> Callable[[], Any]:
    """Training batches from shards, as `lightning fit` reads them."""
    data = CC3M(str(shards), batch_size=batch, workers=0, shuffle=100, decoding=decoding)
    data.attach(halves(transform)[0], tokenizer)
    return lambda: drain(data.train_dataloader())


def plain(folder: Path, transform: Any, batch: int) -> Callable[[], Any]:
    """torchvision's ImageFolder with open_clip's transform."""
    loader = DataLoader(ImageFolder(str(folder), transform, is_valid_file=lambda path: is_image(Path(path))), batch)
    return lambda: drain(loader)


def pillow(photographs: list[bytes]) -> Callable[[], Any]:
    """Pillow's decoder alone."""
    return lambda: drain(Image.open(io.BytesIO(data)).convert("RGB") for data in photographs)


def drain(things: Iterable[Any]) -> None:
    """Take everything, keep nothing."""
    deque(things, maxlen=0)


def cpu_seconds(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of CPU of each way; they take turns, and the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            times[name].append(time.process_time() - began)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def measure(photographs: list[bytes], tokenizer: str, size: int, rounds: int) -> dict[str, Any]:
    """Samples per second and core of each way."""
    torch.set_num_threads(1)
    transform = image_transform_v2(
        PreprocessCfg(size=size, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD), is_train=False
    )
    batch = math.gcd(len(photographs), 64)  # the training stream gives full batches alone
    words = load_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        make_shards(photographs, shards := Path(scratch) / "shards")
        (classes := Path(scratch) / "classes" / "one").mkdir(parents=True)
        for number, data in enumerate(photographs):
            (classes / f"{number:08d}.jpg").write_bytes(data)
        ways = {
            "ours": ours(shards, transform, words, "draft", batch),
            "ours, exact": ours(shards, transform, words, "exact", batch),
            "plain loader": plain(classes.parent, transform, batch),
            "Pillow alone": pillow(photographs),
        }
        taken = cpu_seconds(ways, rounds)
    rates = {name: len(photographs) / seconds for name, seconds in taken.items()}
    return {
        "photographs": len(photographs),
        "mean_bytes": sum(map(len, photographs)) / len(photographs),
        "size": size,
        "samples_per_second_and_core": rates,
        "speedup": rates["ours"] / rates["plain loader"],
        "cores_per_card": PAIRS / STEP / rates["ours"],
        "cores_per_card_plain": PAIRS / STEP / rates["plain loader"],
    }


def main() -> None:
    """Read the command line, measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of JPEGs")
    parser.add_argument("--tokenizer", default="toy", help="language model's name or folder, whose tokenizer is used")
    parser.add_argument("--size", type=int, default=224, help="side of what the tower sees, in pixels")
    parser.add_argument("--shorter", type=int, help="pixels that their shorter side is brought to first (as they are)")
    parser.add_argument("--most", type=int, default=128, help="of the photographs, the first so many")
    parser.add_argument("--rounds", type=int, default=20, help="times that each way goes through them")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.folder.is_dir() or not any(map(is_image, args.folder.iterdir())):
        parser.error(f"{args.folder} is no folder of images: name one")
    photographs = [path.read_bytes() for path in sorted(filter(is_image, args.folder.iterdir()))[: args.most]]
    if args.shorter:
        photographs = [scaled(data, args.shorter) for data in photographs]
    report = measure(photographs, args.tokenizer, args.size, args.rounds)
    print(f"{report['photographs']} photographs of {report['mean_bytes'] / 1000:.0f} kB in the mean, to {args.size} pixels")
    for name, rate in report["samples_per_second_and_core"].items():
        print(f"{name:14}{rate:8.0f} samples per second and core{1000 / rate:8.2f} ms each")
    print(f"speedup over the plain loader {report['speedup']:.2f}")
    wanted = f"{PAIRS} pairs in {STEP} s"
    print(f"cores that feed a card of {wanted}: {report['cores_per_card']:.1f}, plain {report['cores_per_card_plain']:.1f}")
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
