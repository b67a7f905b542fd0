"""What a DETR decoder learns from the states of Octopus' queries, by what enters it.

    python tools/probe_queries.py --octopus STAGE1_CKPT --world FOLDER --json probe.json
    python tools/probe_queries.py --octopus STAGE1_CKPT --world FOLDER --judge STAGE2_CKPT STAGE3_CKPT

The states of the queries after the bottom layers are computed once, from a checkpoint of stage 1 and new queries; the
language model is frozen. For each way in, a decoder of its own is trained on them and on the patches with the detection loss
alone, on RefCOCO+'s training expressions, and judged on its validation expressions: how often its best box is right. The
world is that of `fromage toy make`. Half an hour of a core for all rows. --judge has whole models' own decoders judged in
their place, on the same expressions.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from study import Figures, Run, begin, every, measured, table
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from fromage.io import digest_of
from fromage.octopus import RefCOCO, matching
from fromage.octopus.collate import Collate
from fromage.octopus.examples import Example
from fromage.octopus.matching import Objects, detection_loss
from fromage.octopus.model import Octopus, load_octopus
from fromage.octopus.module import load_trained
from fromage.octopus.patch_store import PatchStore
from fromage.octopus.recognition import Recognizer
from fromage.octopus.step import read_prompts
from fromage.toy.scenes import COLOURS, SHAPES
from fromage.training.config_options import options_of
from fromage.training.configs import find_config
from fromage.training.schedule import Schedule

SIZES = {"num_queries": 8, "decoder_width": 96, "decoder_layers": 4, "heads": 4}
MAIN, SCALE = 0.95, 3.0  # of whitened states: share of the variance that is kept, standard deviation of each direction
SHOWN = {"all": "all", "colour": "the red one", "shape": "the arrow"}


class Seen(NamedTuple):
    """States and patches of E expressions about I images."""

    states: Tensor  # (E, N, d)
    patches: Tensor  # (I, P, m)
    rows: Tensor  # (E,): whose patches
    boxes: Tensor  # (E, 4): left, top, right, bottom of the object meant
    texts: list[str]


def see(model: Octopus, examples: Sequence[Example], store: PatchStore) -> Seen:
    """The states of the queries where they enter the decoder, and the patches it looks at."""
    found: list[Tensor] = []
    collate = Collate(model, stored=True, ask=True)
    handle = model.recognizer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        for start in range(0, len(examples), 100):
            batch = collate([([[each]], store[each.image]) for each in examples[start : start + 100]])
            read_prompts(model, batch, batch.patches)  # type: ignore[arg-type]
    handle.remove()
    images = {image: i for i, image in enumerate(dict.fromkeys(each.image for each in examples))}
    return Seen(
        torch.cat(found).float(),
        torch.stack([store[image] for image in images]).float(),
        torch.tensor([images[each.image] for each in examples]),
        torch.tensor([each.boxes[each.meant[0]] for each in examples]),
        [each.instruction for each in examples],
    )


class Way(NamedTuple):
    """One way into the decoder.

    Attributes:
        given: what stands for the states: training's -> validation's, (E, N, d') each.
        whitened: whether the decoder begins with whitened states.
        faster: times of the learning rate for the map into the decoder.
        normed: whether the decoder's layer norm stands before that map.
        score: weight of the score, in the loss and in the matching; DETR's is 1.
    """

    given: Callable[[Seen, Seen], tuple[Tensor, Tensor]] = lambda train, val: (train.states, val.states)
    whitened: bool = False
    faster: float = 1.0
    normed: bool = True
    score: float = 1.0


def words(train: Seen, val: Seen) -> tuple[Tensor, Tensor]:
    """Three at each word that the expression has, in place of states."""
    known = sorted({word for text in train.texts for word in text.split()})
    N = train.states.shape[1]
    rows = [torch.tensor([[3.0 * (word in text.split()) for word in known] for text in each.texts]) for each in (train, val)]
    return rows[0].unsqueeze(1).expand(-1, N, -1), rows[1].unsqueeze(1).expand(-1, N, -1)  # (E, W) -> (E, N, W)


def centred(train: Seen, val: Seen) -> tuple[Tensor, Tensor]:
    """The normed states without their mean, ten times as large."""
    normed = [nn.functional.layer_norm(each.states, each.states.shape[-1:]) for each in (train, val)]
    mean = normed[0].mean((0, 1))  # (d,)
    return 10 * (normed[0] - mean), 10 * (normed[1] - mean)


@torch.no_grad()
def whiten(linear: nn.Linear, states: Tensor, seed: int) -> None:
    """Let a map into the decoder begin as one that whitens the states (M, d), followed by a random map.

    Their main directions then have equal variance and zero mean. Which words a prompt has makes a small part of the
    variance, and a random map alone keeps these shares. (Data-dependent initialisation: Kraehenbuehl et al., ICLR 2016.)
    """
    mean, (variances, directions) = states.mean(0), torch.linalg.eigh(torch.cov(states.T))  # (d,), (d,), (d, d)
    variances, directions = variances.flip(0), directions.flip(1)  # largest first
    count = min(int((variances.cumsum(0) < MAIN * variances.sum()).sum()) + 1, linear.out_features)
    whitened = SCALE * directions[:, :count] * variances[:count].rsqrt()  # (d, n)
    torch.manual_seed(seed)
    mix = nn.Linear(count, linear.out_features)  # (c, n)
    linear.weight.copy_(mix.weight @ whitened.T)
    linear.bias.copy_(mix.bias - linear.weight @ mean)


WAYS = {
    "a layer norm and a random map": Way(),
    "the same, its learning rate tenfold": Way(faster=10.0),
    "the states without their mean, times ten": Way(centred, normed=False),
    "whitened": Way(whitened=True),
    "the score's weight four": Way(score=4.0),
    "a row for each word": Way(words, normed=False),
}


def train(way: Way, seen: Seen, unseen: Seen, args: argparse.Namespace) -> Figures:
    """Train a decoder, and judge it."""
    torch.manual_seed(args.seed)
    given, other = way.given(seen, unseen)
    (P, m), (N, d) = seen.patches.shape[1:], given.shape[1:]
    decoder = Recognizer(d, m, (round(P**0.5),) * 2, N, SIZES["decoder_width"], SIZES["decoder_layers"], SIZES["heads"])
    if way.whitened:
        normed = decoder.enter[0](given).detach().flatten(0, 1)  # (E N, d)
        whiten(decoder.enter[1], normed, args.seed)
    if not way.normed:
        decoder.enter[0] = nn.Identity()
    entry = list(decoder.enter.parameters())
    rest = [p for name, p in decoder.named_parameters() if not name.startswith("enter.")]
    optimizer = torch.optim.AdamW(
        [{"params": entry, "lr": args.lr * way.faster}, {"params": rest}], lr=args.lr, weight_decay=0.0
    )
    cosine = Schedule(optimizer, decay=args.steps)
    meant = box_convert(seen.boxes, "xyxy", "cxcywh").unsqueeze(1)  # (E, 1, 4)
    for _ in range(args.steps):
        some = torch.randint(len(given), (args.batch_size,))
        found = decoder(given[some], seen.patches, seen.rows[some])
        with patch.object(matching, "SCORE", way.score):
            loss, _ = detection_loss(found, Objects(meant[some], [1] * len(some)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        cosine.step()
    return judge(decoder, other, unseen)


@torch.no_grad()
def judge(decoder: Recognizer, given: Tensor, seen: Seen) -> Figures:
    """How often the box of the best score is right, in percent: of all expressions, and of those of one word of a kind."""
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(given), 300):
        part = slice(start, start + 300)
        found = decoder(given[part], seen.patches, seen.rows[part])
        best = found.corners[torch.arange(len(found.scores)), found.scores.argmax(1)]  # (E, 4)
        hits = box_iou(best, seen.boxes[part]).diagonal() >= 0.5
        for text, hit in zip(seen.texts[part], hits.tolist(), strict=True):
            right["all"].append(hit)
            right[kind(text)].append(hit)
    return {name: 100 * sum(hits) / len(hits) for name, hits in right.items() if name}


def judge_whole(checkpoint: Path, examples: Sequence[Example], store: PatchStore) -> Figures:
    """As judge, of the decoder of a whole model."""
    model = load_octopus(str(checkpoint))
    seen = see(model, examples, store)
    return judge(model.recognizer, seen.states, seen)


def kind(text: str) -> str:
    """What alone an expression names: 'colour' of "the red one", 'shape' of "the arrow"; '' of others."""
    (thing,) = re.findall(r"the ([^?]+)", text) or [""]
    alone, _, one = thing.rpartition(" ")
    return "colour" if one == "one" and alone in COLOURS else "shape" if thing in SHAPES else ""


def main() -> None:
    """Read the command line, train, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--octopus", type=Path, required=True, help="checkpoint of stage 1 on the toy towers")
    parser.add_argument("--world", type=Path, required=True, help="folder of `fromage toy make`")
    parser.add_argument(
        "--judge", type=Path, nargs="+", metavar="CKPT", help="checkpoints of stages 2 and 3 to judge instead"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/probe"), help="folder of patches and of each row's figures")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="; ".join(WAYS))
    parser.add_argument("--train", type=int, default=12000, help="expressions to train on, at most")
    parser.add_argument("--val", type=int, default=1500, help="expressions that judge, at most")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=options_of(str(find_config("octopus_toy2.yaml")))["lr"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures; runs that it holds stay")
    args = parser.parse_args()
    begin(args.threads)
    model = Octopus.load(**SIZES, seed=args.seed)
    load_trained(model, str(args.octopus))
    files = (
        args.world / "refcoco+" / "refs(unc).p",
        args.world / "refcoco" / "instances.json",
        args.world / "refcoco" / "images",
    )

    def shown(split: str, limit: int) -> tuple[list[Example], PatchStore]:
        examples = list(RefCOCO(*map(str, files), split=split, limit=limit))
        store = PatchStore(args.out / "patches", model.vision)
        store.add(list(dict.fromkeys(each.image for each in examples)))
        return examples, store

    if args.judge:
        unseen = shown("val", args.val)
        runs = {str(path): {"": {"figures": judge_whole(path, *unseen)}} for path in args.judge}
        print(f"\n{table(SHOWN, runs)}\n\nin %, of {args.val} validation expressions at most")
        return
    parts = [see(model, *shown(split, limit)) for split, limit in (("train", args.train), ("val", args.val))]
    setting = {
        "octopus": digest_of(args.octopus)[:16],
        "world": str(args.world),
        "train": args.train,
        "val": args.val,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
    }

    def run(name: str, seed: int) -> Run:
        print(f"== {name}", flush=True)
        place = args.out / f"{name.replace(' ', '_')}_{seed}.json"
        return measured(place, lambda: train(WAYS[name], *parts, args), **setting)

    runs = every(args.only, [args.seed], run, args.json, **setting)
    print(f"\n{table(SHOWN, runs)}\n\nin %, of {args.val} validation expressions at most")


if __name__ == "__main__":
    main()
