"""Time grounded answers of Octopus against those of its sequential counterpart, interleaved in one run.

    python tools/bench_grounding.py --octopus CKPT --sequential CKPT --world FOLDER    # a trained pair; judged as well
    python tools/bench_grounding.py                                   # 12-layer OPT 768 wide, random weights
    python tools/bench_grounding.py --preset paper --device cuda      # LLaMA-7B's and CLIP ViT-L/14-336's sizes, bfloat16

Time is from an image and an instruction to the finished answer, one at a time: with the image's patch features given,
and from its pixels. Both sides read the prompt in one pass and decode greedily on its keys and values, by the same code;
their logits are overruled, so that an answer is exactly 1, 2, 3, 4 or 8 boxes and </s>, or a sentence with so many boxes
among its words, as a caption has them. A box is one token for Octopus. For the
counterpart it is four numbers of three decimals, each digit a token as in LLaMA's vocabulary: 25 tokens (17 to 18 in
OPT's, which has tokens of several digits). What Octopus pays for that, its queries in the prompt and the DETR decoder, is
part of the prefill: all there is before an answer's first token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_generate import seconds_of
from on_device import device_name
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from fromage.checkpoints.format import DTYPES
from fromage.config import OctopusConfig
from fromage.data.tokenizer import IMAGE_TOKEN, PromptTokenizer
from fromage.errors import UserError
from fromage.evals.options import Options
from fromage.evals.refcoco import evaluate
from fromage.images.open import open_image
from fromage.io import write_json
from fromage.models.frozen import TOY
from fromage.models.language_model import LanguageModel
from fromage.models.prompts import ImageInput
from fromage.models.vision.registry import load_patches
from fromage.octopus.answers import GroundedAnswer, answer_ids
from fromage.octopus.decoding import ground
from fromage.octopus.examples import Example
from fromage.octopus.model import Octopus, load_octopus
from fromage.octopus.queries import QUERY, index_token_names
from fromage.octopus.sources import RefCOCO

BOXES = (1, 2, 3, 4, 8)
FORMS = ("", "_from_pixels", "_in_a_sentence")  # patch features; the image; patch features, with words between the boxes
WORDS = " and a small red star "  # before each box of a sentence
PAPER = {1: (0.17, 0.89), 4: (0.82, 3.80)}  # its seconds by the number of boxes, Octopus' and sequential (Table 4)
ASKED = "where is the small star left of the big red ring?"
QUERIES = 64
OPT = {"vocab_size": 50272, "pad_token_id": 1, "dropout": 0.0, "attention_dropout": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"width": 768, "layers": 12, "heads": 12, "vision": "ViT-B-32", "dtype": "float32", "family": "opt"},
    "paper": {"width": 4096, "layers": 32, "heads": 32, "vision": "ViT-L-14-336", "dtype": "bfloat16", "family": "llama"},
    "tiny": {"width": 64, "layers": 2, "heads": 2, "vision": "ViT-S-32", "dtype": "float32", "family": "opt"},
}


def build(preset: dict[str, Any], n: int, device: str) -> Octopus:
    """An Octopus of n queries, or the counterpart (0), with random weights."""
    sizes = {"hidden_size": preset["width"], "num_hidden_layers": preset["layers"], "num_attention_heads": preset["heads"]}
    if preset["family"] == "opt":
        config: Any = OPTConfig(word_embed_proj_dim=preset["width"], ffn_dim=4 * preset["width"], **OPT, **sizes)
    else:
        config = LlamaConfig(intermediate_size=11008, **sizes)
    tokenizer = PromptTokenizer(str(TOY / "opt"), index_token_names(n), (IMAGE_TOKEN, QUERY))
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(config, dtype=DTYPES[preset["dtype"]])
    tower = load_patches(preset["vision"], dtype=preset["dtype"], random_weights=True)
    return Octopus(LanguageModel(hf, tokenizer, "random"), tower, OctopusConfig(num_queries=n)).to(device).eval()


def forced(model: Octopus, count: int, words: str = "") -> list[int]:
    """The tokens of an answer of so many boxes, words before each of them, </s> after."""
    boxes = tuple((i / 100, 0.2, 0.5 + i / 100, 0.9) for i in range(count))
    said = tuple(piece for number in range(count) for piece in (words, number) if piece != "")
    return answer_ids(Example("", "", ASKED, said, boxes), model.tokenizer, model.num_queries)


@contextmanager
def saying(model: Octopus, ids: Sequence[int]) -> Iterator[None]:
    """Within, the tokens decoded are these, whatever the model computes."""
    rest = iter(ids)

    def overrule(head: torch.nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
        logits[..., next(rest)] = torch.inf
        return logits

    handle = model.lm.hf.get_output_embeddings().register_forward_hook(overrule)
    try:
        yield
    finally:
        handle.remove()


def answer(model: Octopus, image: ImageInput, count: int, words: str = "") -> GroundedAnswer:
    """An answer of so many boxes; with none, the prompt is read and one token chosen: the prefill."""
    ids = forced(model, count, words) if count else [0]
    with saying(model, ids):
        (told,) = ground(model, [(image, ASKED)], len(ids))
    assert len(told.boxes) == count
    return told


def measure(models: dict[str, Octopus], image: Image.Image, rounds: int, boxes: Sequence[int]) -> dict[str, Any]:
    """Both sides and how they compare, by the number of boxes."""
    calls: dict[str, Callable[[], Any]] = {}
    for who, model in models.items():
        features = model.vision(model.vision.transform(image).unsqueeze(0))[0]  # (P, m)
        for count in (0, *boxes):
            calls[f"{who} {count}"] = partial(answer, model, features, count)
            calls[f"{who} {count}_from_pixels"] = partial(answer, model, image, count)
            calls[f"{who} {count}_in_a_sentence"] = partial(answer, model, features, count, WORDS)
    octopus = models["octopus"]
    taken = seconds_of(calls, rounds, octopus.device)
    report: dict[str, Any] = {
        "device": device_name(octopus.device),
        "patches": octopus.vision.shape[0],
        "queries": octopus.num_queries,
    }
    for given in FORMS:
        for count in boxes:
            slow, fast = (taken[f"{who} {count}{given}"] for who in ("sequential", "octopus"))
            report[f"speedup_{named(count)}{given}"] = round(slow / fast, 2)
    return report | {who: one_side(model, who, taken, boxes) for who, model in models.items()}


def one_side(model: Octopus, who: str, taken: dict[str, float], boxes: Sequence[int]) -> dict[str, Any]:
    """What a box costs, and the times of one side, with the prefill's share in them."""
    figures: dict[str, Any] = {"tokens_per_box": (len(forced(model, 8)) - len(forced(model, 3))) / 5}
    for given in FORMS:
        prefill, whole = taken[f"{who} 0{given}"], {count: taken[f"{who} {count}{given}"] for count in boxes}
        figures[f"seconds{given}"] = {"prefill": prefill} | {named(count): each for count, each in whole.items()}
        figures[f"prefill_share{given}"] = {named(count): round(prefill / each, 3) for count, each in whole.items()}
    return figures


def named(count: int) -> str:
    """'1_box', '3_boxes'."""
    return f"{count}_box{'es' if count > 1 else ''}"


def trained(args: argparse.Namespace) -> dict[str, Any]:
    """A pair of checkpoints: how fast, and how often right on the toy world's val split."""
    files = (str(args.world / "refcoco" / name) for name in ("refs(unc).p", "instances.json", "images"))
    data = RefCOCO(*files, split="val", limit=args.limit)
    image = open_image(data.examples[0].image)
    models = {who: load_octopus(getattr(args, who), args.device) for who in ("octopus", "sequential")}
    if models["octopus"].num_queries < max(BOXES) or models["sequential"].num_queries:
        raise UserError(f"--octopus wants a model of at least {max(BOXES)} object queries, --sequential one of none")
    report = measure(models, image, args.rounds, BOXES)
    for who, model in models.items():
        found = evaluate(model, data, Options())
        report[who] |= {"acc_iou50": found[who]["val"]["acc_iou50"], "checkpoint": found["checkpoint"]}
        report["examples"] = found["examples"]
    return report


def untrained(args: argparse.Namespace) -> dict[str, Any]:
    """A pair with random weights: how fast."""
    torch.manual_seed(0)
    models = {who: build(PRESETS[args.preset], n, args.device) for who, n in (("octopus", QUERIES), ("sequential", 0))}
    image = Image.effect_noise((640, 480), 64).convert("RGB")
    return {"preset": args.preset} | measure(models, image, args.rounds, BOXES)


def table(report: dict[str, Any]) -> str:
    """The figures as lines; times in milliseconds."""
    ours, theirs = report["octopus"], report["sequential"]
    lines = [f"{'milliseconds':24}{'octopus':>12}{'sequential':>12}{'ratio':>8}{'prefill, %':>20}"]
    for given in FORMS:
        for name, fast in ours[f"seconds{given}"].items():
            slow = theirs[f"seconds{given}"][name]
            shares = [100 * side[f"prefill_share{given}"].get(name, 1) for side in (ours, theirs)]
            times = f"{name.replace('_', ' ') + given.replace('_', ' '):24}{1000 * fast:12.1f}{1000 * slow:12.1f}"
            lines.append(f"{times}{slow / fast:8.2f}{shares[0]:13.0f} and {shares[1]:.0f}")
    for count, (fast, slow) in PAPER.items():
        lines.append(
            f"{named(count).replace('_', ' ') + ', the paper':24}{1000 * fast:12.1f}{1000 * slow:12.1f}{slow / fast:8.2f}"
        )
    lines.append(f"tokens for a box: {ours['tokens_per_box']:.0f} and {theirs['tokens_per_box']:.0f}; {report['device']}")
    if "examples" in report:
        lines.append(f"right (IoU 0.5) in {ours['acc_iou50']:.1f} and {theirs['acc_iou50']:.1f} % of {report['examples']}")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Read the command line, measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--octopus", help="checkpoint of Octopus")
    parser.add_argument("--sequential", help="checkpoint of the counterpart")
    parser.add_argument("--world", type=Path, help="folder of `fromage toy make`, on whose val split they are judged")
    parser.add_argument("--limit", type=int, default=1000, help="examples they are judged on, at most")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="sizes, where no checkpoints are given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each side and number of boxes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    given = [args.octopus, args.sequential, args.world]
    if any(given) and not all(given):
        parser.error("give --octopus, --sequential and --world together, or none of them")
    try:
        report = trained(args) if all(given) else untrained(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(report))
    if args.json:
        write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
