"""The whole path on real photographs: pack, store features, train, index, search, and find the training pictures again.

    python tools/real_input.py --data FOLDER --out runs/coco_sample

FOLDER holds coco_sample/ (captions_val2017_sample.json, val2017/*.jpg) and opt_tokenizer/ (OPT's vocab.json, merges.txt).
The towers have the real layouts at moderate size and random weights, so nothing is learned about the world: the figure
says whether the path memorises its own training pictures, and against which chance.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

from fromage.backbones import TOY
from fromage.checkpoint import load_model
from fromage.cli import main as fromage
from fromage.data import CC3M
from fromage.evals.retrieval import evaluate

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


def run(data: Path, out: Path, steps: int) -> dict[str, float]:
    """All of it; returns the recalls, in percent, of each picture's first caption among all pictures."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    make_opt(data / "opt_tokenizer", out / "opt")
    make_clip(out / "clip")
    coco = data / "coco_sample"
    captions, pictures = str(coco / "captions_val2017_sample.json"), str(coco / "val2017")
    vision, config = f"local-dir:{out / 'clip'}", "coco_sample.yaml"
    checkpoint = out / "checkpoints" / "last.ckpt"
    verbs = [
        ["shards", "coco", captions, "--images", pictures, "--out", str(out / "shards")],
        ["shards", "coco", captions, "--images", pictures, "--captions", "first", "--out", str(out / "first")],
        ["features", str(out / "shards"), "--vision", vision, "--out", str(out / "features")],
        ["fit", "--config", config, f"--trainer.max_steps={steps}",
         f"--model.lm={out / 'opt'}", f"--model.vision={vision}",
         f"--data.train_shards={out / 'features'}", f"--trainer.logger.init_args.save_dir={out}",
         f"--trainer.callbacks.init_args.dirpath={checkpoint.parent}"],
        ["index", "build", "--ckpt", str(checkpoint), "--images", pictures, "--captions", captions,
         "--out", str(out / "index")],
        ["search", "a man riding a wave on a surfboard", "a cat", "a plate of food", "--index", str(out / "index"),
         "--png", str(out / "searches.png")],
    ]  # fmt: skip
    for words in verbs:
        print("\n$ fromage", *words, flush=True)
        if fromage(words):
            raise SystemExit(2)
    model = load_model(checkpoint)
    loader = CC3M(str(out / "first"), str(out / "first"), batch_size=64, workers=0)
    loader.attach(model.vision.transform, model.tokenizer)
    return evaluate(model, loader.val_dataloader())  # type: ignore[arg-type]


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/coco_sample"))
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of 64 pairs")
    args = parser.parse_args()
    recalls = run(args.data, args.out, args.steps)
    print("\nthe 128 training pictures, found by their own first captions (chance: r1 0.8 %); recall in %")
    print(json.dumps({name: round(value, 1) for name, value in recalls.items()}))


if __name__ == "__main__":
    main()
