"""Time the ranking of VisDial's answers with and without the prompt's keys and values kept, interleaved, on random weights.

    python tools/bench_evals.py                                # 12-layer OPT 768 wide
    python tools/bench_evals.py --preset paper --device cuda   # OPT-6.7B, bfloat16

Three rounds of a dialogue after an image, a hundred candidates of 1 to 7 tokens for each answer. Without, the prompt runs
again for every candidate, 20 of them in a batch padded to the longest, as the released code does it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_generate import seconds_of, with_words, words
from bench_step import PRESETS, build
from on_device import device_name
from torch import Tensor

from fromage.data.padding import pad
from fromage.generation.score import score
from fromage.io import write_json
from fromage.models.fromage import Fromage
from fromage.models.prompts import START, Prompt, embed_prompts, prompt_length

ROUNDS, CANDIDATES, TOGETHER = (1, 5, 10), 100, 20


def dialogue(model: Fromage, rng: random.Random) -> list[tuple[Prompt, list[str]]]:
    """For each of the rounds a prompt, 15 tokens longer with each round before it, and the candidates after it."""
    image, asked = torch.randn(model.vision.width, device=model.device), words(rng, 15 * max(ROUNDS)).split()
    return [
        (
            [image, START, " ".join(asked[: 15 * number - 5])],
            [words(rng, rng.choice((1, 2, 3, 4, 7))) for _ in range(CANDIDATES)],
        )
        for number in ROUNDS
    ]


@torch.no_grad()
def score_again(model: Fromage, prompt: Prompt, texts: list[str]) -> Tensor:
    """(C,) log-likelihoods, prompt and candidate together for each, TOGETHER at a time."""
    embeds = embed_prompts(model, [prompt]).embeds  # (1, P, d)
    totals = []
    for start in range(0, len(texts), TOGETHER):
        rows = [model.tokenizer.encode(text) for text in texts[start : start + TOGETHER]]
        ids, mask = (x.to(model.device) for x in pad(rows, 1))  # (c, T) each
        both = torch.cat([embeds.expand(len(ids), -1, -1), model.embed(ids)], 1)  # (c, P + T, d)
        judged = model.lm.hf(inputs_embeds=both, use_cache=False).logits[:, embeds.shape[1] - 1 : -1].float().log_softmax(-1)
        chosen = judged.gather(2, ids.unsqueeze(2)).squeeze(2)  # (c, T)
        totals.append(chosen.masked_fill(~mask, 0).sum(1))
    return torch.cat(totals)


def measure(preset: str, device: str, rounds: int) -> dict[str, Any]:
    """Seconds for the three rounds, both ways, and whether they agree."""
    torch.manual_seed(0)
    model = with_words(build(PRESETS[preset], device))
    talk = dialogue(model, random.Random(0))
    calls: dict[str, Callable[[], Any]] = {
        "prompt again for each candidate": lambda: [score_again(model, *turn) for turn in talk],
        "prompt kept": lambda: [score(model, *turn).total for turn in talk],
    }
    slow, fast = (torch.cat(call()) for call in calls.values())
    taken = seconds_of(calls, rounds, model.device)
    again, kept = taken.values()
    return {
        "preset": preset,
        "device": device_name(model.device),
        "prompt_tokens": [prompt_length(model, prompt) for prompt, _ in talk],
        "candidates": CANDIDATES,
        "seconds": taken,
        "speedup_prefix_cache": again / kept,
        "max_score_error": float((slow - fast).abs().max()),
    }


def main() -> None:
    """Read the command line, measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; one of each side")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = measure(args.preset, args.device, args.rounds)
    for name, taken in report["seconds"].items():
        print(f"{name:36}{taken:10.3f} s for rounds {ROUNDS}")
    print(f"prefix cache {report['speedup_prefix_cache']:.1f} x; {report['device']}")
    print(f"largest difference of scores {report['max_score_error']:.1e} nats")
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
