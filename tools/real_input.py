"""The whole path on real photographs, killed on the way: pack, check, store, train, export, evaluate, index, search.

    python tools/real_input.py --data FOLDER --out runs/coco_sample

FOLDER holds coco_sample/ (captions_val2017_sample.json, val2017/*.jpg) and opt_tokenizer/ (OPT's vocab.json, merges.txt).
The towers have the real layouts at moderate size and random weights, so nothing is learned about the world: the figure
says whether the path memorises its own training images, and against which chance. Storing features, training and embedding
are each killed (SIGKILL) as soon as they have written something, and then started again. With --compare, training is done
once more without a kill, and its weights have to be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

from fromage.cli.main import main as fromage
from fromage.data.datamodule import CC3M
from fromage.evals.retrieval import evaluate
from fromage.models.fromage import load_model
from fromage.models.frozen import TOY

KILLS = ("features", "fit", "embed")
CLIP = {
    "model_cfg": {
        "embed_dim": 256,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": 4, "width": 256, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
}


def make_opt(vocabulary: Path, out: Path) -> None:
    """An OPT folder as published: OPT's own vocabulary, 4 layers 256 wide, random weights."""
    config = OPTConfig(
        hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, num_hidden_layers=4, num_attention_heads=8, init_std=0.05
    )
    OPTForCausalLM(config).save_pretrained(out)
    for path in (vocabulary / "vocab.json", vocabulary / "merges.txt", TOY / "opt" / "tokenizer_config.json"):
        shutil.copyfile(path, out / path.name)


def make_clip(out: Path) -> None:
    """An open_clip folder as published, random weights."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(json.dumps(CLIP))
    model = open_clip.create_model(f"local-dir:{out}", load_weights=False)
    save_file(model.state_dict(), out / "open_clip_model.safetensors")


def do(*words: str) -> None:
    """Run a verb of the command line to its end."""
    print("\n$ fromage", *words, flush=True)
    if fromage(list(words)):
        raise SystemExit(2)


def start(*words: str, comment: str = "") -> subprocess.Popen[bytes]:
    """Start a verb in a process of its own, with one thread: sums are then taken in the same order every time."""
    print("\n$ fromage", *words, comment, flush=True)
    return subprocess.Popen([sys.executable, "-m", "fromage.cli.main", *words], env=os.environ | {"OMP_NUM_THREADS": "1"})


def do_alone(*words: str) -> None:
    """Run a verb to its end in a process of its own."""
    if start(*words).wait():
        raise SystemExit(2)


def kill(begun: Path, *words: str) -> None:
    """Run a verb in a process of its own, and kill it when a file is there."""
    process = start(*words, comment="   # to be killed")
    while process.poll() is None and not begun.exists():
        time.sleep(0.01)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise SystemExit(f"it was over (exit code {process.returncode}) before it could be killed")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same trained parameters after as many steps, bit for bit."""
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    equal = all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())
    return equal and a["global_step"] == b["global_step"]


def run(data: Path, out: Path, steps: int, kills: Collection[str] = KILLS, compare: bool = False) -> dict[str, float]:
    """All of it; returns the recalls, in percent, of each image's first caption among all images."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    make_opt(data / "opt_tokenizer", out / "opt")
    make_clip(out / "clip")
    coco = data / "coco_sample"
    captions, images = str(coco / "captions_val2017_sample.json"), ("--images", str(coco / "val2017"))
    shards, first, features, embeddings = (str(out / name) for name in ("shards", "first", "features", "embeddings"))
    vision, last = f"--vision=local-dir:{out / 'clip'}", str(out / "checkpoints" / "last.ckpt")

    do("shards", "coco", captions, *images, "--out", shards, "--per-shard", "80")
    do("shards", "coco", captions, *images, "--captions", "first", "--out", first, "--per-shard", "16")
    do("shards", "check", shards, "--tokenizer", str(out / "opt"), "--png", str(out / "samples.png"), "--workers", "0")
    store = ("features", shards, vision, "--out", features, "--batch-size", "20")
    if "features" in kills:
        kill(Path(features, "00000.tar"), *store)
    do(*store)
    fit = ["fit", "--config=coco_sample.yaml", f"--trainer.max_steps={steps}", f"--model.lm={out / 'opt'}",
           f"--model.{vision[2:]}", f"--data.train_shards={features}", f"--trainer.logger.init_args.save_dir={out}",
           f"--trainer.callbacks.init_args.every_n_train_steps={max(1, steps // 10)}"]  # fmt: skip
    saved = f"--trainer.callbacks.init_args.dirpath={out}"
    if "fit" in kills:
        kill(Path(last), *fit, f"{saved}/checkpoints")
    train = do_alone if compare else do  # equal to the bit only among equal processes
    train(*fit, f"{saved}/checkpoints", "--ckpt_path=last")
    if compare:
        train(*fit, f"{saved}/straight")
        if not same_weights(Path(last), out / "straight" / "last.ckpt"):
            raise SystemExit("the killed run ended with other weights than the one that was not")
    do("export", "--ckpt", last, "--out", str(out / "model"), "--dtype", "float32")
    do("eval", "coco", captions, *images, "--ckpt", str(out / "model"))
    embed = ("index", "embed", "--ckpt", str(out / "model"), "--images", first, "--out", embeddings)
    if "embed" in kills:
        kill(Path(embeddings, "00000.parquet"), *embed)
    do(*embed)
    do("index", "build", "--embeddings", embeddings, "--out", str(out / "index"))
    do("search", "a man riding a wave on a surfboard", "a cat", "a plate of food", "--index", str(out / "index"),
       "--png", str(out / "searches.png"))  # fmt: skip

    model = load_model(last)
    loader = CC3M(first, first, batch_size=64, workers=0)
    loader.attach(model.vision.transform, model.tokenizer)
    return evaluate(model, loader.val_dataloader())  # type: ignore[arg-type]


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/coco_sample"))
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of 64 pairs")
    parser.add_argument("--compare", action="store_true", help="train again without a kill, and compare the weights")
    args = parser.parse_args()
    recalls = run(args.data, args.out, args.steps, compare=args.compare)
    print("\nthe 128 training images, found by their own first captions (chance: r1 0.8 %); recall in %")
    print(json.dumps({name: round(value, 1) for name, value in recalls.items()}))


if __name__ == "__main__":
    main()
