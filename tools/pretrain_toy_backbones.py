"""Train the two toy towers on the toy world's training scenes and write them in the published formats.

    python tools/pretrain_toy_backbones.py lm   --out fromage/toy/backbones/opt
    python tools/pretrain_toy_backbones.py clip --out fromage/toy/backbones/clip

`lm` trains a tiny OPT from texts alone (tools/toy_documents.py) and writes a Hugging Face folder. `clip` trains a
tiny CLIP on single captions and writes an open_clip folder ('local-dir:'). No validation scene is ever shown to either;
the figures printed on the way are of validation scenes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from toy_documents import EOS, FIRST_SHARES, SHARES, document, tag_words, tags
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from fromage.toy.language import caption, story
from fromage.toy.scenes import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, TIMES, Scene, draw, sample_scene, sample_scenes

OPT_TOKENIZER = {
    "tokenizer_class": "GPT2Tokenizer",
    "add_bos_token": True,
    "add_prefix_space": False,
    "bos_token": "</s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "</s>",
    "errors": "replace",
}


def schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to a twentieth."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# --- the language model ------------------------------------------------------------------------------------------------


def opt_tokenizer(out: Path, rng: random.Random, init: Path | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE with OPT's special tokens at OPT's ids, in which every tag is one token (or an earlier leg's)."""
    if init:
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copyfile(init / name, out / name)
        return AutoTokenizer.from_pretrained(out)
    texts = [part for _ in range(20000) for part in document(rng).split(EOS)]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=1500, min_frequency=20, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    bpe.save_model(str(out))
    (out / "tokenizer_config.json").write_text(json.dumps(OPT_TOKENIZER, indent=2) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(out)
    split = [w for w in tag_words() if len(tokenizer(" " + w, add_special_tokens=False).input_ids) != 1]
    assert not split, f"tags of more than one token: {split}"
    return tokenizer


def lm_rows(tokenizer: PreTrainedTokenizerFast, rng: random.Random, tokens: int, first: int):  # noqa: ANN201
    """Endless batches of whole documents of like length, `tokens` per batch with padding: (ids, labels), both (B, T).

    The first batches hold more of the documents that are learned fast.
    """
    made = 0
    while True:
        shares = FIRST_SHARES if made < first else SHARES
        ids = [[*row, 2] for row in tokenizer([document(rng, shares=shares) for _ in range(1500)]).input_ids]
        ids.sort(key=len)
        batches, batch = [], []
        for row in ids:
            if batch and (len(batch) + 1) * len(row) > tokens:
                batches.append(batch)
                batch = []
            batch.append(row)
        rng.shuffle(batches)
        made += len(batches)
        for batch in batches:
            rows = torch.full((len(batch), max(map(len, batch))), 1)
            for i, row in enumerate(batch):
                rows[i, : len(row)] = torch.tensor(row)
            yield rows, rows.masked_fill(rows == 1, -100)


@torch.no_grad()
def probe_lm(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 200) -> dict[str, float]:
    """Skills on validation scenes: share of colour, shape and place words right when tags are unfolded, for 1 and 2-3
    objects, and probability mass on true tags at the one position before them, after a caption and after a story."""
    rng = random.Random(7)
    words = {tokenizer.encode(" " + w, add_special_tokens=False)[0] for w in (*COLOURS, *SHAPES, *PLACES)}
    tag_id = {w: tokenizer.encode(" " + w, add_special_tokens=False)[0] for w in tag_words()}
    got: dict[str, list[float]] = {}
    for i in range(count):
        scene = sample_scene(rng, "val", n=1 if i % 2 else rng.choice((2, 3)))
        kind = "one" if len(scene.things) == 1 else "many"
        ids = torch.tensor([tokenizer(" ".join(tags(scene, rng)) + EOS + caption(scene, rng)).input_ids])
        best, start = model(ids).logits[0].argmax(-1), ids[0].tolist().index(2, 1)
        got.setdefault(f"unfold_{kind}", []).extend(
            float(best[t - 1] == ids[0, t]) for t in range(start + 1, ids.shape[1]) if int(ids[0, t]) in words
        )
        tale = story(rng, "val")
        for name, text, last in (
            (f"fold_{kind}", caption(scene, rng, 1.0), scene),
            ("fold_story", " ".join(tale.sentences), tale.scenes[-1]),
        ):
            ids = torch.tensor([tokenizer(text + " so:").input_ids])
            mass = model(ids).logits[0, -1].softmax(-1)
            true = tags(last, rng)
            hits = torch.stack([mass[tag_id[w]] for w in true])
            got.setdefault(name, []).append(float(hits.clamp(max=1 / len(true)).sum()))
    return {k: round(float(np.mean(v)), 3) for k, v in got.items()}


def train_lm(args: argparse.Namespace) -> None:
    """Train the tiny OPT; writes config.json, model.safetensors and the tokenizer's files to args.out."""
    rng = random.Random(args.seed)
    tokenizer = opt_tokenizer(args.out, random.Random(args.seed + 1), args.init)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=args.width, word_embed_proj_dim=args.width, ffn_dim=4 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=args.width // 24, max_position_embeddings=512,
        dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
    )  # fmt: skip
    model = OPTForCausalLM.from_pretrained(args.init, dtype=torch.float32) if args.init else OPTForCausalLM(config)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    warm = schedule(optimizer, args.steps)
    began = time.time()
    for step, (ids, labels) in enumerate(lm_rows(tokenizer, rng, args.tokens, 0 if args.init else args.steps // 5)):
        if step % 250 == 0 or step == args.steps:
            print(step, f"{time.time() - began:.0f}s", probe_lm(model, tokenizer), flush=True)
            save_lm(model, args.out)
        if step == args.steps:
            break
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            hidden = model.model(input_ids=ids, attention_mask=(ids != 1).long()).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[labels[:, 1:] >= 0].float())
        loss = F.cross_entropy(logits, labels[:, 1:][labels[:, 1:] >= 0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(step, f"{time.time() - began:.0f}s loss {loss.item():.3f}", flush=True)


def save_lm(model: OPTForCausalLM, out: Path) -> None:
    """Write the model in bf16, as large ones are published."""
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(out)


# --- CLIP --------------------------------------------------------------------------------------------------------------


def clip_tokenizer(out: Path, rng: random.Random) -> int:
    """A BPE of caption words whose end-of-text id is the highest, as CLIP's pooling expects; returns the vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [caption(sample_scene(rng, "train"), rng) for _ in range(5000)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=["<pad>"], initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    start, end = (tokenizer.token_to_id(t) for t in ("<|startoftext|>", "<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        unk_token="<pad>",
    )
    fast.save_pretrained(out)
    return end + 1


def clip_config(vocab_size: int) -> dict:
    """The open_clip configuration, as on the model hub: open_clip_config.json. CLIP's ResNet: a ViT of this size and so
    few steps never learns shapes."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 24, "head_width": 32, "patch_size": None},
            "text_cfg": {
                "context_length": 48, "vocab_size": vocab_size, "width": 128, "heads": 4, "layers": 3,
                "hf_tokenizer_name": "local",
            },
        },
        "preprocess_cfg": {"mean": mean, "std": std},
    }  # fmt: skip


def near(scene: Scene, rng: random.Random) -> Scene:
    """A training scene that differs in one attribute, mostly a shape or a place: what an image's colours do not tell."""
    while True:
        index = rng.randrange(len(scene.things))
        what = rng.choices(("shape", "place", "colour", "size", "ground", "time"), (4, 4, 1, 2, 1, 1))[0]
        if what in ("ground", "time"):
            other = replace(scene, **{what: rng.choice({"ground": list(GROUNDS), "time": list(TIMES)}[what])})
        else:
            values = {"shape": SHAPES, "place": list(PLACES), "colour": list(COLOURS), "size": list(SIZES)}[what]
            taken = {getattr(t, what) for t in scene.things} if what != "size" else set()
            value = rng.choice([v for v in values if v not in taken])
            things = list(scene.things)
            things[index] = replace(things[index], **{what: value})
            other = replace(scene, things=tuple(things))
        if other.split == "train" and other.key != scene.key:
            return other


def clip_images(groups: int, preprocess, rng: random.Random) -> tuple[list, torch.Tensor]:  # noqa: ANN001
    """Groups of four training scenes, three a single attribute away from the first, and their images (4 N, 3, H, W)."""
    bases = sample_scenes(rng, "train", groups)
    scenes = [scene for base in bases for scene in (base, *(near(base, rng) for _ in range(3)))]
    return scenes, torch.stack([preprocess(draw(s, rng.randrange(1000))[0]).half() for s in scenes])


@torch.no_grad()
def probe_clip(model, tokenizer, preprocess, count: int = 1000) -> float:  # noqa: ANN001
    """Text-to-image R@1, in percent, over validation scenes."""
    rng = random.Random(11)
    scenes = sample_scenes(rng, "val", count)
    pixels = torch.stack([preprocess(draw(s)[0]) for s in scenes])
    image = torch.cat([model.encode_image(p, normalize=True) for p in pixels.split(250)])
    text = torch.cat([model.encode_text(t, normalize=True) for t in tokenizer([caption(s, rng) for s in scenes]).split(250)])
    return 100 * ((text @ image.T).argmax(1) == torch.arange(count)).float().mean().item()


def tag_labels(scenes: list[Scene]) -> torch.Tensor:
    """(B, 158): 1 where a scene has the tag."""
    place = {word: i for i, word in enumerate(tag_words())}
    labels = torch.zeros(len(scenes), len(place))
    for row, scene in zip(labels, scenes, strict=True):
        row[[place[word] for word in tags(scene, random.Random(0))]] = 1
    return labels


def train_clip(args: argparse.Namespace) -> None:
    """Train the tiny CLIP; writes open_clip_config.json, open_clip_model.safetensors and the tokenizer to args.out.

    Beside InfoNCE, one linear classifier on both towers' embeddings names the scene's tags: weak supervision by words,
    which makes so short a training see shapes and places. It is dropped afterwards.
    """
    import open_clip

    rng = random.Random(args.seed)
    config = clip_config(clip_tokenizer(args.out, random.Random(args.seed + 1)))
    (args.out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    name = f"local-dir:{args.out}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, load_weights=False)
    tokenizer = open_clip.get_tokenizer(name)
    scenes, pixels = clip_images(args.groups, preprocess, rng)
    tagger = torch.nn.Linear(128, len(tag_words()))
    torch.nn.init.constant_(tagger.bias, -3.0)
    image_side = [*model.visual.parameters(), *tagger.parameters()]
    text_side = [p for n, p in model.named_parameters() if not n.startswith("visual.")]
    groups = [{"params": image_side, "lr": 3 * args.lr}, {"params": text_side}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    warm = schedule(optimizer, args.steps)
    began = time.time()
    for step in range(args.steps + 1):
        if step % 100 == 0 or step == args.steps:
            model.eval()
            print(step, f"{time.time() - began:.0f}s R@1 {probe_clip(model, tokenizer, preprocess):.1f}", flush=True)
            state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
            save_file(state, args.out / "open_clip_model.safetensors", metadata={"format": "pt"})
            model.train()
        if step == args.steps:
            break
        picked = [4 * group + i for group in rng.sample(range(len(scenes) // 4), args.batch // 4) for i in range(4)]
        text = tokenizer([caption(scenes[i], rng) for i in picked])
        image, words = model.encode_image(pixels[picked].float()), model.encode_text(text)  # (B, 128) each
        logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(words, dim=-1).T
        target, labels = torch.arange(len(logits)), tag_labels([scenes[i] for i in picked])
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        named = sum(F.binary_cross_entropy_with_logits(tagger(x), labels, reduction="sum") for x in (image, words))
        loss = contrast + 0.2 * named / len(logits)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(0, math.log(100))
        if step % 50 == 0:
            print(
                step,
                f"{time.time() - began:.0f}s contrast {contrast.item():.3f} tags {named.item() / len(logits):.2f}",
                flush=True,
            )


def main() -> None:
    """Read the command line and train one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("lm", "clip"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="optimiser steps (lm 4000, clip 1100)")
    parser.add_argument("--width", type=int, default=192, help="lm: width")
    parser.add_argument("--layers", type=int, default=4, help="lm: layers")
    parser.add_argument("--lr", type=float, help="peak learning rate (lm 2e-3, clip 1e-3)")
    parser.add_argument("--tokens", type=int, default=4000, help="lm: tokens per batch, padding included")
    parser.add_argument("--batch", type=int, default=128, help="clip: pairs per batch")
    parser.add_argument("--groups", type=int, default=6000, help="clip: training scenes with three near ones each")
    parser.add_argument("--init", type=Path, help="lm: folder of an earlier leg to go on from")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="lm: autocast to bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.steps = args.steps or {"lm": 4000, "clip": 1100}[args.which]
    args.lr = args.lr or {"lm": 2e-3, "clip": 1e-3}[args.which]
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    {"lm": train_lm, "clip": train_clip}[args.which](args)


if __name__ == "__main__":
    main()
