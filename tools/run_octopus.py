"""Octopus on the toy world with several seeds, its sequential counterpart, and ablations: train all, judge all, tables.

    python tools/run_octopus.py --out runs/octopus_study                         # all, three seeds: two hours of one core
    python tools/run_octopus.py --out runs/octopus_study --only octopus sequential --seeds 0

octopus and sequential are trained as lightning_configs/octopus_toy*.yaml say. The ablations change one thing each of a
shorter run, `base`: stage 3 right after stage 1, on referring expressions alone. What is there is not run again: after a
kill, give the command again; to use two cores, give it twice, with other seeds (once the patches are there).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fromage.backbones import load_patches
from fromage.octopus.patch_store import PatchStore
from fromage.toy import octopus_tour

SHORT = ["--trainer.max_steps=400", "--trainer.val_check_interval=400"]
ABLATIONS = {
    "base": [],
    "n8": ["--model.n=8"],
    "n32": ["--model.n=32"],
    "bottom": ["--model.after=1"],
    "top": ["--model.after=3"],
    "no_relay": ["--model.relay=false"],
}
MAIN = ("octopus", "sequential")


def prepare(out: Path) -> None:
    """The world of all runs, and the patches of its pictures."""
    octopus_tour.make(out)
    pictures = [str(path) for part in ("refcoco/images", "coco") for path in sorted((out / "world" / part).rglob("*.jpg"))]
    PatchStore(out / "patches", load_patches("toy")).add(pictures)


def train(name: str, out: Path, seed: int, options: list[str]) -> Path:
    """Train one configuration, unless it is there; returns its checkpoint."""
    folder, seeded = out / f"seed{seed}", [f"--{what}={seed}" for what in ("seed_everything", "model.seed", "data.seed")]
    if name == "octopus":
        return octopus_tour.tour(folder, [*seeded, *options], out)
    if name == "sequential":
        return octopus_tour.sequential(folder, [*seeded, *options], out)
    checkpoint = folder / name / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        world = out / "world" / "refcoco"
        files = {"refs": f"{world}/refs(unc).p", "instances": f"{world}/instances.json", "images": f"{world}/images"}
        words = [
            f"--model.init={folder / 'stage1' / 'checkpoints' / 'last.ckpt'}",
            f"--data.train={json.dumps([{'class_path': 'fromage.octopus.RefCOCO', 'init_args': files}])}",
            f"--trainer.callbacks.init_args.dirpath={checkpoint.parent}",
            f"--trainer.logger.init_args.name={name}",
        ]
        octopus_tour.train(folder, octopus_tour.STAGES[2:], [*seeded, *SHORT, *words, *ABLATIONS[name], *options], out)
    return checkpoint


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the world and the runs")
    known = [*MAIN, *ABLATIONS]
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("options", nargs="*", help="behind --: further words for `lightning fit`")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prepare(args.out)
    for seed in args.seeds:
        for name in args.only:
            train(name, args.out, seed, args.options)


if __name__ == "__main__":
    main()
