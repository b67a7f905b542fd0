"""Time the reference training step against the fast one, interleaved in one run, on random weights.

    python tools/bench_step.py --preset cpu                  # 12-layer OPT 768 wide, ViT-B/32, batch 32
    python tools/bench_step.py --preset paper --device cuda  # OPT-6.7B, ViT-L/14, batch 180, bfloat16
    python tools/bench_step.py --preset small --device cuda  # SmolLM2-135M's shape, ViT-B/32, batch 180, bfloat16

The reference side is the authors' computation as it is: both passes padded to 24 tokens, each image encoded twice, the whole
backward in both. Speed does not depend on the values of the weights. Caption lengths are drawn from those of all 25,014
captions of COCO val2017 in OPT's vocabulary. Time is between two events on a CUDA device. Memory is the peak above the
weights: of the device allocator on CUDA; on a CPU of the tensors alive, counted operation by operation in a run of its own
(training.meter). `--compile` adds the fast step with compiled layers, `--precision` the error of both steps' gradients in
bfloat16 against the reference step's in float32, at a depth of four layers. `--exact` has both steps' gradients in float32
against the reference step's in float64, parameter by parameter: which step a difference between them comes from.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from on_device import Save, device_name, elapsed, keep_nothing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from fromage.checkpoints.format import DTYPES
from fromage.config import FromageConfig
from fromage.data.batches import Batch
from fromage.io import write_json
from fromage.models.fromage import Fromage
from fromage.models.language_model import LanguageModel
from fromage.models.vision.open_clip import OpenClipTower
from fromage.training.fast_step import fast_step
from fromage.training.layers import compile_blocks
from fromage.training.meter import Meter
from fromage.training.reference_step import StepOutput, reference_step

Step = Callable[[Fromage, Batch, bool], StepOutput]
Kinds = dict[str, tuple[Step, bool]]  # by name: a step, and whether it is given pixels rather than stored features

# words of a caption in tokens, without </s> and [RET]: how many of COCO val2017's captions have so many
LENGTHS = {
    7: 66, 8: 793, 9: 3056, 10: 4333, 11: 4736, 12: 4052, 13: 2930, 14: 1851, 15: 1150, 16: 717, 17: 434, 18: 278, 19: 187,
    20: 108, 21: 94, 22: 258,
}  # fmt: skip
MAX_TOKENS = 24
SHALLOW = 4  # layers at which float32 and bfloat16 are compared
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"width": 768, "layers": 12, "heads": 12, "vision": "ViT-B-32", "batch": 32, "dtype": "float32"},
    "paper": {"width": 4096, "layers": 32, "heads": 32, "vision": "ViT-L-14", "batch": 180, "dtype": "bfloat16"},
    "tiny": {"width": 64, "layers": 2, "heads": 2, "vision": "ViT-S-32", "batch": 4, "dtype": "float32"},
    # SmolLM2-135M: heads share keys and values by threes, embeddings are tied
    "small": {
        "family": "llama", "width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "ffn": 1536, "tokens": 49152,
        "vision": "ViT-B-32", "batch": 180, "dtype": "bfloat16",
    },
    "small tiny": {
        "family": "llama", "width": 48, "layers": 2, "heads": 3, "kv_heads": 1, "ffn": 96, "tokens": 49152,
        "vision": "ViT-S-32", "batch": 4, "dtype": "float32",
    },
}  # fmt: skip


def lm_config(preset: dict[str, Any]) -> Any:
    """The language model's configuration: OPT's with its 50,272 rows, or one of the LLaMA family."""
    sizes = {"hidden_size": preset["width"], "num_hidden_layers": preset["layers"], "num_attention_heads": preset["heads"]}
    if preset.get("family") == "llama":
        rows, kv_heads, ffn = preset["tokens"], preset["kv_heads"], preset["ffn"]
        shape = {"vocab_size": rows, "num_key_value_heads": kv_heads, "intermediate_size": ffn, "tie_word_embeddings": True}
        return LlamaConfig(architectures=["LlamaForCausalLM"], **shape, **sizes)
    return OPTConfig(
        architectures=["OPTForCausalLM"], vocab_size=50272, word_embed_proj_dim=preset["width"],
        ffn_dim=4 * preset["width"], dropout=0.0, attention_dropout=0.0, **sizes,
    )  # fmt: skip


def build(preset: dict[str, Any], device: str) -> Fromage:
    """A language model and an open_clip tower, random weights, on the device from the start."""
    dtype, config = DTYPES[preset["dtype"]], lm_config(preset)
    first = preset.get("tokens", 50265)  # of the added tokens: <|image|>, then [RET]
    ids = SimpleNamespace(
        vocab_size=first, image_id=first, ret_id=first + 1, ret_ids=[first + 1], trained_ids=[first + 1], pad_id=1, bos_id=2,
        eos_id=2, start=lambda: [2],
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
            clip = open_clip.create_model(preset["vision"], pretrained=None, device=device)
    finally:
        torch.set_default_dtype(before)
    tower = OpenClipTower(clip.to(dtype), None, preset["vision"])
    return Fromage(LanguageModel(hf, ids, "random"), tower, FromageConfig()).to(device)  # type: ignore[arg-type]


def make_batch(model: Fromage, size: int, seed: int, pixels: bool) -> Batch:
    """Random words in captions of real lengths, padded to 24, and random images or stored features."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [2 + n for n in rng.choices(list(LENGTHS), list(LENGTHS.values()), k=size)]
    ids, ret = torch.full((size, MAX_TOKENS), 1), model.tokenizer.ret_id  # (B, T)
    for row, n in zip(ids, lengths, strict=True):
        words = torch.randint(4, model.tokenizer.vocab_size, (n - 2,), generator=generator)
        row[:n] = torch.cat([torch.tensor([2]), words, torch.tensor([ret])])
    there = torch.Generator(model.device).manual_seed(seed)
    shape = (size, 3, *model.vision.image_size)
    images = torch.randn(shape, generator=there, device=model.device).to(model.vision.dtype)  # (B, 3, H, W)
    features = None if pixels else model.vision(images)  # (B, m)
    return Batch([], [], ids.to(model.device), lengths, images if pixels else None, features)


def compiled(model: Fromage) -> Step:
    """The fast step with compiled layers, which stay as they are for everybody else."""
    compile_blocks(model.lm)
    forwards = {block: block.forward for block in model.lm.blocks}
    for block in forwards:
        del block.forward

    def step(model: Fromage, batch: Batch, paired: bool) -> StepOutput:
        for block, forward in forwards.items():
            block.forward = forward
        try:
            return fast_step(model, batch, paired)
        finally:
            for block in forwards:
                del block.forward

    return step


def memory(model: Fromage, optimizer: torch.optim.Optimizer, batch: Batch, step: Callable[[], None]) -> tuple[int, int]:
    """Bytes at the moment of most memory in a step, above weights, optimiser and batch; and bytes of these."""
    given = [t for t in (batch.ids, batch.pixels, batch.features) if t is not None]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    kept = [*model.parameters(), *model.buffers(), *moments, *given]
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held, held
    meter = Meter(kept)
    meter.run("step", step)
    return meter.passes["step"].peak, sum({t.untyped_storage().data_ptr(): t.nbytes for t in kept}.values())


def one_step(step: Step, model: Fromage, optimizer: torch.optim.Optimizer, batch: Batch, paired: bool) -> None:
    """Losses, backward, clipping, Adam: a whole training step. It does not wait for the device."""
    optimizer.zero_grad()
    step(model, batch, paired).loss.backward()
    torch.nn.utils.clip_grad_norm_(list(model.trained().values()), 1.0)
    optimizer.step()
    model.ret.rescale_()


def gradients(step: Step, model: Fromage, batch: Batch, paired: bool) -> dict[str, Tensor]:
    """Of every trained parameter, in float32, or in float64 for a model in it."""
    model.zero_grad()
    step(model, batch, paired).loss.backward()
    found = {name: p.grad.float().clone() for name, p in model.trained().items() if p.grad is not None}
    model.zero_grad()
    return found


def apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative difference of any gradient, ||got - want|| / ||want||."""
    return max(((got[name] - grad).norm() / grad.norm()).item() for name, grad in want.items())


@contextmanager
def without_kinks(model: Fromage) -> Iterator[None]:
    """Within, OPT's layers have GELU in place of ReLU.

    ReLU's derivative jumps at zero, so a unit within rounding of zero may pass a gradient in one computation and none in
    another; of millions a few always do. With GELU, gradients differ by rounding alone.
    """
    kinked = [block for block in model.lm.blocks if isinstance(getattr(block, "activation_fn", None), nn.ReLU)]
    before = [block.activation_fn for block in kinked]
    for block in kinked:
        block.activation_fn = nn.GELU()
    try:
        yield
    finally:
        for block, was in zip(kinked, before, strict=True):
            block.activation_fn = was


def gradient_error(model: Fromage, batch: Batch) -> float:
    """Largest relative difference, over trained parameters and both forms, between the two steps' gradients."""
    forms = (False, True)
    sides = [[gradients(step, model, batch, paired) for step in (reference_step, fast_step)] for paired in forms]
    return max(apart(fast, reference) for reference, fast in sides)


def precision_errors(preset: dict[str, Any], device: str, layers: int = SHALLOW) -> dict[str, Any]:
    """Largest relative gradient error of both steps in bfloat16, against the reference step in float32.

    The weights are the same on all sides, rounded to bfloat16; so what differs is arithmetic. Few layers, since float32
    takes twice the memory and much more time. Without the temperature: its gradient is one number, and may be near zero.
    """
    shallow = preset | {"layers": min(layers, preset["layers"])}
    torch.manual_seed(0)
    rounded, whole = (build(shallow | {"dtype": dtype}, device) for dtype in ("bfloat16", "float32"))
    whole.load_state_dict(rounded.state_dict())
    with exact_products():
        batch = make_batch(whole, preset["batch"], 0, pixels=True)
        want = [gradients(reference_step, whole, batch, paired) for paired in (False, True)]
    want = [{name: grad for name, grad in grads.items() if grad.numel() > 1} for grads in want]
    errors = {
        name: max(apart(gradients(step, rounded, batch, bool(i)), grads) for i, grads in enumerate(want))
        for name, step in (("reference", reference_step), ("fast", fast_step))
    }
    return {"layers": shallow["layers"], "max_rel_grad_error_bfloat16": errors}


def rounding_errors(preset: dict[str, Any], device: str, smooth: bool) -> dict[str, dict[str, float]]:
    """Relative errors of the steps' gradients in float32, by step and parameter, against the reference step in float64.

    The larger of those with pairs and without; stored features, which are the same numbers on all sides. smooth: see
    without_kinks.
    """
    torch.manual_seed(0)
    single = build(preset | {"dtype": "float32"}, device)
    with without_kinks(single) if smooth else nullcontext():
        return _against_double(single, deepcopy(single).double(), preset["batch"])


def _against_double(single: Fromage, double: Fromage, size: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {"reference": {}, "fast": {}}
    with exact_products():
        batch = make_batch(single, size, 0, pixels=False)
        for paired in (False, True):
            with patch.object(Tensor, "float", lambda self: self if self.dtype == torch.float64 else self.to(torch.float32)):
                want = gradients(reference_step, double, batch._replace(features=batch.features.double()), paired)  # type: ignore[union-attr]
            for name, step in (("reference", reference_step), ("fast", fast_step)):
                for parameter, grad in gradients(step, single, batch, paired).items():
                    error = ((grad.double() - want[parameter]).norm() / want[parameter].norm()).item()
                    found[name][parameter] = max(error, found[name].get(parameter, 0.0))
    return found


@contextmanager
def exact_products() -> Iterator[None]:
    """Within, float32 products on a card are not rounded to TF32."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    try:
        yield
    finally:
        for flag, was in zip(flags, before, strict=True):
            flag.allow_tf32 = was


class Bench:
    """A model of a preset, and what has been measured with it so far."""

    def __init__(self, preset: str, device: str, save: Save = keep_nothing) -> None:
        torch.manual_seed(0)
        self.name, self.preset, self.save = preset, PRESETS[preset], save
        self.model = build(self.preset, device)
        self.optimizer = torch.optim.Adam(list(self.model.trained().values()), lr=3e-4, betas=(0.9, 0.95))
        self.seconds: dict[str, list[float]] = {}
        self.more: dict[str, Any] = {"peak_memory_bytes": {}, "held_bytes": {}}

    def batch(self, seed: int, pixels: bool) -> Batch:
        """One of the preset's size."""
        return make_batch(self.model, self.preset["batch"], seed, pixels)

    def step(self, step: Step, batch: Batch, paired: bool) -> Callable[[], None]:
        """A whole training step, ready to be called."""
        return partial(one_step, step, self.model, self.optimizer, batch, paired)

    def rounds(self, kinds: Kinds, rounds: int, warm: int) -> None:
        """Time the kinds in turns; pairs share a sequence in every other round. warm: rounds before, which do not count."""
        for turn in range(rounds + warm):
            for name, (step, pixels) in kinds.items():
                taken = elapsed(self.step(step, self.batch(turn, pixels), bool(turn % 2)), self.model.device)
                self.seconds.setdefault(name, []).extend([taken] if turn >= warm else [])
            self.save(self.report())

    def peaks(self, kinds: Kinds) -> None:
        """Memory of each kind, unpaired as `fromage plan` counts it; and of pairs, where that is more."""
        for name, (step, pixels) in kinds.items():
            batch = self.batch(0, pixels)
            peaks = []
            for paired in (False, True):
                self.optimizer.zero_grad()
                peak, held = memory(self.model, self.optimizer, batch, self.step(step, batch, paired))
                peaks.append(peak)
            self.more["peak_memory_bytes"][name], self.more["held_bytes"][name] = max(peaks), held
            self.save(self.report())

    def errors(self) -> None:
        """How far the fast step's gradients are from the reference one's, in the preset's dtype: without kinks and with."""
        with without_kinks(self.model):
            self.more["max_rel_grad_error"] = gradient_error(self.model, self.batch(0, pixels=False))
        self.more["max_rel_grad_error_with_relu"] = gradient_error(self.model, self.batch(0, pixels=False))
        self.save(self.report())

    def report(self) -> dict[str, Any]:
        """All figures so far; ratios where both sides are there."""
        median = {name: statistics.median(times) for name, times in self.seconds.items() if times}
        size, peaks, lengths = self.preset["batch"], self.more["peak_memory_bytes"], self.batch_lengths()
        report = {
            "preset": self.name,
            "device": device_name(self.model.device),
            "batch": size,
            "mean_caption": statistics.mean(lengths),
            "longest_caption": max(lengths),
            "rounds": {name: len(times) for name, times in self.seconds.items()},
            "seconds": median,
            "examples_per_second": {name: size / s for name, s in median.items()},
            **self.more,
        }
        ratios = {"speedup": "fast", "speedup_stored_features": "stored features", "speedup_compiled": "fast, compiled"}
        report |= {
            key: median["reference"] / median[name] for key, name in ratios.items() if {"reference", name} <= median.keys()
        }
        if {"reference", "fast"} <= peaks.keys():
            report["peak_memory_ratio"] = peaks["fast"] / peaks["reference"]
        return report

    def batch_lengths(self) -> list[int]:
        """Tokens of the captions of the batch that memory is measured with, </s> and [RET] included."""
        words = random.Random(0).choices(list(LENGTHS), list(LENGTHS.values()), k=self.preset["batch"])
        return [2 + n for n in words]


def measure(
    preset: str, device: str, rounds: int, compile: bool = False, precision: bool = False, save: Save = keep_nothing
) -> dict[str, Any]:
    """All figures of a preset; save is given them as they come, those that may fail last.

    Raises torch.OutOfMemoryError where the reference step does not fit.
    """
    bench = Bench(preset, device, save)
    kinds: Kinds = {"reference": (reference_step, True), "fast": (fast_step, True), "stored features": (fast_step, False)}
    bench.rounds(kinds, rounds, 1 if device == "cpu" else 2)
    bench.peaks(kinds)
    bench.errors()
    if compile:
        both: Kinds = {"fast": (fast_step, True), "fast, compiled": (compiled(bench.model), True)}
        bench.rounds(both, rounds, warm=2)  # with and without pairs
        bench.peaks({"fast, compiled": both["fast, compiled"]})
    report = bench.report()
    if precision:
        del bench  # its model makes room
        report |= precision_errors(PRESETS[preset], device)
        save(report)
    return report


def main() -> None:
    """Read the command line, measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; one of reference, fast and stored each")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", action="store_true", help="time the fast step with compiled layers too")
    parser.add_argument("--exact", action="store_true", help="compare gradients in float32 and float64, by parameter")
    parser.add_argument("--precision", action="store_true", help="compare gradients in bfloat16 and float32 too")
    args = parser.parse_args()
    report = measure(args.preset, args.device, args.rounds, args.compile, args.precision)
    print(f"{'':16}{'s/step':>10}{'examples/s':>12}{'ratio':>8}{'peak MB':>10}")
    median, peaks = report["seconds"], report["peak_memory_bytes"]
    for name, s in median.items():
        print(f"{name:16}{s:10.3f}{report['batch'] / s:12.1f}{median['reference'] / s:8.2f}{peaks[name] / 2**20:10.0f}")
    smooth, kinked = report["max_rel_grad_error"], report["max_rel_grad_error_with_relu"]
    print(f"largest relative gradient error {smooth:.1e}, with ReLU {kinked:.1e}; {report['device']}")
    if args.precision:
        errors = report["max_rel_grad_error_bfloat16"].items()
        print("in bfloat16, against float32: " + ", ".join(f"{name} {error:.1e}" for name, error in errors))
    if args.exact:
        report["rel_grad_error_float32"] = {}
        for kind in ("gelu", "relu"):
            found = rounding_errors(PRESETS[args.preset], args.device, smooth=kind == "gelu")
            report["rel_grad_error_float32"][kind] = found
            for name, errors in found.items():
                told = ", ".join(f"{parameter} {error:.1e}" for parameter, error in errors.items())
                print(f"{name} with {kind}, float32 against float64: {told}")
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
