"""Time generation and scoring against the authors' way of doing them, interleaved in one run, on random weights.

    python tools/bench_generate.py                                # 12-layer OPT 768 wide
    python tools/bench_generate.py --preset paper --device cuda   # OPT-6.7B, bfloat16

Generation: 32 tokens after a prompt of 100 tokens, one image among them. The authors run prompt and answer again for
every token, the logits of all places with it; here keys and values are kept. Scoring: 100 answers of 3 to 7 tokens to
that prompt, one whole pass each against one pass of the prompt that all of them share. On a CPU, generation is timed once
more with weights in float16 (Decoding.half_weights); an answer counts as changed from its first other token on, and the loss
is that of random words. The first piece of a stream is timed too: what a user of a chat waits for. `--static`
adds Hugging Face's static cache, which on a card it compiles and replays as CUDA graphs, where it offers that for input
embeddings.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_step import PRESETS, build
from on_device import Save, device_name, elapsed, keep_nothing
from torch import Tensor, nn

from fromage.generation.generate import generate, stream
from fromage.generation.options import Decoding
from fromage.generation.score import score
from fromage.io import write_json
from fromage.models.cpu_linear import halves_of, with_cpu_linears
from fromage.models.fromage import Fromage
from fromage.models.prompts import Prompt, embed_prompts, prompt_length

PROMPT, NEW, CANDIDATES = 100, 32, 100  # tokens, tokens, answers
COMPARED = 8  # prompts whose answers are compared
JUDGED = 15  # tokens of a text whose loss is taken: so few rows are read with weights in float16


def with_words(model: Fromage) -> Fromage:
    """Let numbers be the words of the model, whose tokenizer is a stand-in."""
    tokenizer: Any = model.tokenizer
    tokenizer.start = lambda: [tokenizer.bos_id]
    tokenizer.encode = lambda text: [int(word) for word in text.split()]
    tokenizer.decode = lambda ids: " ".join(map(str, ids))
    return model


def words(rng: random.Random, count: int) -> str:
    """So many random words."""
    return " ".join(str(rng.randrange(4, 50000)) for _ in range(count))


@torch.no_grad()
def generate_as_authors(model: Fromage, prompt: Prompt) -> list[int]:
    """Greedy: the whole sequence again for each token, without [RET]."""
    embeds, ids = embed_prompts(model, [prompt]).embeds, []
    for _ in range(NEW):
        logits = model.lm.hf(inputs_embeds=embeds, use_cache=False).logits  # (1, T, V + 2)
        logits[..., [model.tokenizer.ret_id, model.tokenizer.eos_id or 0]] = -torch.inf
        token = logits[:, -1:].argmax(-1)  # (1, 1)
        embeds = torch.cat([embeds, model.embed(token)], 1)  # (1, T + 1, d)
        ids.append(int(token))
    return ids


@torch.no_grad()
def generate_static(model: Fromage, prompt: Prompt) -> list[int]:
    """Greedy, without [RET], by Hugging Face's static cache: keys and values at fixed addresses, as CUDA graphs need."""
    prompts = embed_prompts(model, [prompt])
    ids = model.lm.hf.generate(
        inputs_embeds=prompts.embeds,
        attention_mask=prompts.mask.long(),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        suppress_tokens=[model.tokenizer.ret_id, model.tokenizer.eos_id],
        pad_token_id=model.tokenizer.pad_id,
        eos_token_id=model.tokenizer.eos_id,
        cache_implementation="static",
    )
    return ids[0].tolist()


@torch.no_grad()
def score_one_by_one(model: Fromage, prompt: Prompt, texts: list[str]) -> Tensor:
    """(C,) log-likelihoods, a whole pass for each."""
    totals = []
    embeds = embed_prompts(model, [prompt]).embeds  # (1, T, d)
    for text in texts:
        ids = torch.tensor([model.tokenizer.encode(text)], device=model.device)  # (1, n)
        logits = model.lm.hf(inputs_embeds=torch.cat([embeds, model.embed(ids)], 1), use_cache=False).logits
        judged = logits[0, -ids.shape[1] - 1 : -1].float().log_softmax(-1)  # (n, V + 2)
        totals.append(judged.gather(1, ids[0].unsqueeze(1)).sum())
    return torch.stack(totals)


def seconds_of(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each call; they take turns, and the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(elapsed(call, device))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def measure(preset: str, device: str, rounds: int, static: bool = False, save: Save = keep_nothing) -> dict[str, Any]:
    """Both comparisons, and whether the two sides agree. save is given the figures before the static cache is tried."""
    torch.manual_seed(0)
    model, rng = with_words(build(PRESETS[preset], device)), random.Random(0)
    image = torch.randn(model.vision.width, device=device)
    prompt: Prompt = [words(rng, 49), image, words(rng, 48)]  # and </s> twice
    assert prompt_length(model, prompt) == PROMPT
    texts = [words(rng, rng.randint(3, 7)) for _ in range(CANDIDATES)]
    plain = Decoding(NEW, min_new_tokens=NEW, max_images=0)
    calls: dict[str, Callable[[], Any]] = {
        "generate, the whole sequence again": lambda: generate_as_authors(model, prompt),
        "generate, keys and values kept": lambda: generate(model, [prompt], plain)[0].ids,
        "score, one by one": lambda: score_one_by_one(model, prompt, texts),
        "score, prompt shared": lambda: score(model, prompt, texts).total,
    }
    slow, fast, one_by_one, shared = (call() for call in calls.values())
    halves = model.device.type == "cpu" and halves_of(model.lm.hf)
    if halves:
        half = replace(plain, half_weights=True)
        calls["generate, weights in float16"] = lambda: generate(model, [prompt], half)
    taken = seconds_of(calls, rounds, model.device)
    again, kept, each, once = list(taken.values())[:4]
    report = {
        "preset": preset,
        "device": device_name(model.device),
        "speedup_kv_cache": again / kept,
        "speedup_scoring": each / once,
        "seconds": taken,
        "tokens_per_second": {"whole sequence": NEW / again, "cached": NEW / kept},
        "same_tokens": slow == fast,
        "max_score_error": float((one_by_one - shared).abs().max()),
    }
    if halves:
        report["half_weights"] = with_halves(model, rng, plain, kept, taken["generate, weights in float16"])
    report["seconds_to_first_piece"] = first_piece(model, prompt, plain, rounds)
    save(report)
    if static:
        report["static_cache"] = with_static_cache(model, prompt, rounds, fast)
        save(report)
    return report


def first_piece(model: Fromage, prompt: Prompt, decoding: Decoding, rounds: int) -> float:
    """Median seconds from a prompt to the first piece of its streamed answer."""
    taken = []
    for _ in range(rounds):
        pieces: list[Any] = []
        taken.append(elapsed(lambda to=pieces: to.append(stream(model, prompt, decoding)) or next(to[0]), model.device))
        pieces[0].close()
    return statistics.median(taken)


@torch.no_grad()
def loss_of(model: Fromage, rng: random.Random, halves: Any) -> float:
    """Mean loss of random words after random prompts, in nats a token, with weights in float32 or in float16."""
    hf: Any = with_cpu_linears(model.lm.hf, halves)
    found = []
    for _ in range(COMPARED):
        prompt, ids = (torch.tensor([model.tokenizer.encode(words(rng, count))]) for count in (PROMPT, JUDGED))  # (1, t)
        past = hf(input_ids=prompt[:, :-1], use_cache=True).past_key_values
        logits = hf(input_ids=torch.cat([prompt[:, -1:], ids[:, :-1]], 1), past_key_values=past).logits[0]  # (t, V + 2)
        found.append(F.cross_entropy(logits.float(), ids[0]))
    return float(torch.stack(found).mean())


def with_halves(model: Fromage, rng: random.Random, decoding: Decoding, exact: float, half: float) -> dict[str, Any]:
    """Weights read per token and how fast, in both ways; tokens that change; the loss. exact, half: seconds of an answer."""
    halves = halves_of(model.lm.hf)
    size = sum(each.weight.numel() for each in model.lm.hf.modules() if isinstance(each, nn.Linear))
    pairs = []
    for _ in range(COMPARED):
        asked = [[words(rng, PROMPT)]]
        pairs += zip(*(generate(model, asked, replace(decoding, half_weights=h))[0].ids for h in (False, True)), strict=True)
    answers = [pairs[i : i + NEW] for i in range(0, len(pairs), NEW)]
    same = sum(next((i for i, (a, b) in enumerate(answer) if a != b), NEW) for answer in answers)
    return {
        "speedup": exact / half,
        "megabytes_per_token": {"float32": size * 4e-6, "float16": size * 2e-6},
        "gigabytes_per_second": {"float32": size * 4e-9 * NEW / exact, "float16": size * 2e-9 * NEW / half},
        "changed_tokens": 1 - same / len(pairs),
        "loss": {"float32": loss_of(model, random.Random(1), None), "float16": loss_of(model, random.Random(1), halves)},
    }


def with_static_cache(model: Fromage, prompt: Prompt, rounds: int, expected: list[int]) -> dict[str, Any]:
    """Tokens per second with the static cache, and whether it was compiled; or why it is not offered."""
    try:
        ids = generate_static(model, prompt)
    except Exception as error:  # which versions offer it is what is to be found out
        return {"offered": False, "why": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    taken = seconds_of({"static": lambda: generate_static(model, prompt)}, rounds, model.device)["static"]
    compiled = "_compiled_call" in vars(model.lm.hf)  # Hugging Face keeps there what it compiled
    figures = {"offered": True, "compiled": compiled, "seconds": taken, "tokens_per_second": NEW / taken}
    return figures | {"same_tokens": ids == expected}


def main(words: list[str] | None = None) -> None:
    """Read the command line, measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; one of each side")
    parser.add_argument("--static", action="store_true", help="try the static cache too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    report = measure(args.preset, args.device, args.rounds, args.static)
    for name, taken in report["seconds"].items():
        print(f"{name:36}{taken:10.3f} s")
    print(
        f"key-value cache {report['speedup_kv_cache']:.1f} x, scoring {report['speedup_scoring']:.1f} x; {report['device']}"
    )
    if half := report.get("half_weights"):
        rates = ", ".join(f"{kind} {rate:.1f} GB/s" for kind, rate in half["gigabytes_per_second"].items())
        print(f"weights in float16 {half['speedup']:.2f} x, {half['changed_tokens']:.1%} of tokens changed; {rates}")
        print("loss in nats a token: " + ", ".join(f"{kind} {loss:.5f}" for kind, loss in half["loss"].items()))
    print(f"first piece of a stream after {report['seconds_to_first_piece']:.3f} s")
    print(f"same tokens: {report['same_tokens']}; largest difference of scores {report['max_score_error']:.1e} nats")
    if args.static:
        print(f"static cache: {report['static_cache']}")
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
