"""What the planners of FROMAGe's and of Octopus' runs share: configurations, towers without weights, the plan, its report.

A step's FLOP and memory are counted by training.meter; what a device holds in every moment follows from the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, OPTConfig

from fromage.errors import UserError
from fromage.models.frozen import TOY
from fromage.training.meter import Pass

# layers, width, heads: Zhang et al., "OPT: Open Pre-trained Transformer Language Models", 2022, table 1
OPT = {
    "125m": (12, 768, 12), "350m": (24, 1024, 16), "1.3b": (24, 2048, 32), "2.7b": (32, 2560, 32), "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40), "30b": (48, 7168, 56), "66b": (64, 9216, 72),
}  # fmt: skip
# layers, width, heads, inner width: Touvron et al., "LLaMA", 2023, table 2, from which Vicuna is trained
VICUNA = {"lmsys/vicuna-7b-v1.5": (32, 4096, 32, 11008), "lmsys/vicuna-13b-v1.5": (40, 5120, 40, 13824)}
LM, TOWER = "language model", "image tower"


@dataclass
class Plan:
    """Counts of parameters by part, bytes, and FLOP per step, of one device.

    Attributes:
        run: the run, a dataclass of its options.
        heading: the run in words.
        examples: of a step on each device.
        max_steps: steps of the run; below 1: unknown.
        trained: number of trained parameters.
        devices: how many there are.
    """

    run: Any
    heading: str
    examples: int
    max_steps: int
    parameters: dict[str, int]
    trained: int
    trained_bytes: int
    weights: dict[str, int]  # bytes by part, wherever they are held
    held: dict[str, int]  # bytes on a device at all times, by what they are
    batch: int  # bytes
    transient: dict[str, int]  # bytes of large tensors that no backward needs; included in the passes
    beside: dict[str, int]  # bytes of weights in another form while they are used: dequantised, or gathered from devices
    passes: dict[str, Pass]
    devices: int = 1

    @property
    def activations(self) -> dict[str, int]:
        """Bytes kept for the backward, by pass."""
        return {name: sum(p.kept.values()) for name, p in self.passes.items() if p.kept}

    @property
    def peak(self) -> dict[str, int]:
        """Bytes at the peak of memory, by part."""
        names = list(self.passes)
        last = max(names, key=lambda name: self.passes[name].peak)
        kept = {name: n for name, n in self.activations.items() if names.index(name) <= names.index(last)}
        return {
            **self.held,
            "batch": self.batch,
            **{f"kept by {name}": n for name, n in kept.items()},
            f"transient in {last}": self.passes[last].peak - sum(kept.values()),
            **self.beside,
        }

    @property
    def flop(self) -> int:
        """FLOP of a step, two per multiply-add."""
        return sum(p.flop for p in self.passes.values())

    def seconds(self, tflops: float) -> float:
        """Time of a step, in seconds, at a sustained rate in TFLOP/s."""
        return self.flop / (tflops * 1e12)


def of_training(weights: int) -> dict[str, int]:
    """Bytes of trained parameters -> with those of their gradients and of AdamW's two moments, in the same dtype."""
    return {"trained parameters": weights, "their gradients": weights, "their Adam moments": 2 * weights}


RunT = TypeVar("RunT")


def options_of(configs: str | Sequence[str]) -> dict[str, Any]:
    """The options of the trainer, model and data of configurations, a later one before an earlier one."""
    found: dict[str, Any] = {}
    for config in [configs] if isinstance(configs, str) else configs:
        tree = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        for section in (tree.get(name) for name in ("trainer", "model", "data")):
            found |= section.get("init_args", section) if isinstance(section, dict) else {}
    return found


def model_of(configs: Sequence[str]) -> str:
    """The name of the class whose run configurations describe; '' where they name none."""
    sections = [yaml.safe_load(Path(config).read_text(encoding="utf-8")).get("model") for config in configs]
    paths = [section["class_path"] for section in sections if isinstance(section, dict) and "class_path" in section]
    return str(paths[-1]).rpartition(".")[2] if paths else ""


def run_of(kind: type[RunT], found: Mapping[str, Any], configs: str | Sequence[str]) -> RunT:
    """A dataclass from those options that are its fields. Raises UserError for values of another type."""
    named = "configuration " + (configs if isinstance(configs, str) else ", ".join(configs))
    hints = get_type_hints(kind)
    given = {f.name: found[f.name] for f in fields(kind) if found.get(f.name) is not None}  # type: ignore[arg-type]
    return kind(**{name: _as(_plain(hints[name]), value, f"{named}: {name}") for name, value in given.items()})


def _plain(kind: Any) -> Any:
    """The type of an option, without None; str for a choice of texts."""
    if get_origin(kind) is Literal:
        return str
    return next((_plain(part) for part in get_args(kind) if part is not type(None)), kind)


def check_known(kind: type, given: Iterable[str], configs: Sequence[str]) -> None:
    """Raise UserError for options that a kind of run does not have."""
    for name in sorted(set(given) - {f.name for f in fields(kind)}):
        raise UserError(f"--{name.replace('_', '-')}: means nothing for the model of {', '.join(configs)}; leave it out")


def check_choices(run: Any, choices: Mapping[str, Iterable[str | None]]) -> None:
    """Raise UserError for an option that has none of its values."""
    for name, known in choices.items():
        if getattr(run, name) not in known:
            raise UserError(f"{name} {getattr(run, name)}: choose one of {', '.join(filter(None, known))}")


def _as(kind: type, value: Any, name: str) -> Any:
    """A value of a configuration as a kind of number, or a text."""
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        wanted = {int: "a whole number", float: "a number"}.get(kind, "a text")
        raise UserError(f"{name} is {str(value)[:40]!r}, not {wanted}") from error


def quantized_bytes(weight: Tensor, kind: str | None) -> int:
    """Bytes of a weight in bitsandbytes' format: int8 with a float32 scale per row, or NF4 with a byte per block of 64 and
    a float32 scale per 256 blocks (Dettmers et al., "QLoRA", 2023, section 3)."""
    n = weight.numel()
    return n + 4 * weight.shape[0] if kind == "int8" else n // 2 + n // 64 + 4 * (n // (64 * 256))


@contextmanager
def attention_in_parts() -> Iterator[None]:
    """Within, torch.nn's attention runs as several operations; its fast path is one, which hides its work and memory."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def lm_config(name: str) -> Any:
    """The configuration of a causal LM: from a folder, from published sizes by name, or from the hub."""
    folder, size = TOY / "opt" if name == "toy" else Path(name), name.removeprefix("facebook/opt-")
    if not folder.is_dir() and size in OPT:
        layers, width, heads = OPT[size]
        odd: dict[str, Any] = {"do_layer_norm_before": False} if size == "350m" else {}
        return OPTConfig(
            num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, ffn_dim=4 * width,
            word_embed_proj_dim=512 if size == "350m" else width, **odd,
        )  # fmt: skip
    if not folder.is_dir() and name in VICUNA:
        layers, width, heads, inner = VICUNA[name]
        return LlamaConfig(num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=inner)
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else name, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"language model {name}: no configuration on disk or within reach; give a folder with its config.json, "
            f"or one of {', '.join(['facebook/opt-' + size for size in OPT] + [*VICUNA])}"
        ) from error


def report(plan: Plan, tflops: float, share: float) -> str:
    """The plan as text. tflops: peak rate of the device; share: the part of it (0 to 1) that training reaches."""
    kept = {f"{name}: {module}": n for name, p in plan.passes.items() for module, n in p.kept.items() if n >= 2**20}
    within = {f"  of this, {name}": n for name, n in plan.transient.items()}
    each = f" of each of {plan.devices} devices" * (plan.devices > 1)
    lines = [
        plan.heading,
        _row("\nPARAMETERS", "number", "GiB"),
        *(_row(name, f"{n:,}", plan.weights[name]) for name, n in plan.parameters.items()),
        _row("all", f"{sum(plan.parameters.values()):,}", sum(plan.weights.values())),
        _row("trained", f"{plan.trained:,}", plan.trained_bytes),
        _row("\nKEPT FOR THE BACKWARD", "", "GiB"),
        *(_row(name, "", n) for name, n in kept.items()),
        _row("all", "", sum(plan.activations.values())),
        _row("\nPASSES OF A STEP, and what they need beside", "TFLOP", "GiB"),
        *(_row(name, f"{p.flop / 1e12:.3g}", p.transient) for name, p in plan.passes.items()),
        *(_row(name, "", n) for name, n in within.items()),
        _row(f"\nPEAK MEMORY{each}, without the device's libraries", "", "GiB"),
        *(_row(name, "", n) for name, n in plan.peak.items()),
        _row("all", "", sum(plan.peak.values())),
    ]
    return "\n".join([*lines, "", *_work(plan, tflops, share)])


def _row(name: str, cell: str, size: int | str) -> str:
    """A line of a table. size: bytes, or the title of the column."""
    width = 48 + name.startswith("\n")
    return f"{name:{width}}{cell:>16}" + (f"{size:>10}" if isinstance(size, str) else f"{size / 2**30:10.3f}")


def _work(plan: Plan, tflops: float, share: float) -> Iterator[str]:
    steps, each = plan.max_steps, f" on each of {plan.devices} devices" * (plan.devices > 1)
    yield f"WORK  {plan.flop / 1e12:.3g} TFLOP a step{each}, {plan.flop / plan.examples / 1e9:.4g} GFLOP an example" + (
        f", {plan.flop * steps * plan.devices / 1e18:.3g} EFLOP in {steps:,} steps" if steps > 0 else ""
    )
    for part in (1.0, share):
        seconds = plan.seconds(tflops * part)
        hours = f", {seconds * steps / 3600:.2g} h a run" if steps > 0 else ""
        yield f"TIME  {seconds:.2g} s a step{hours}: an estimate, at {part:.0%} of {tflops:g} TFLOP/s"


def as_json(plan: Plan, tflops: float, share: float) -> dict[str, Any]:
    """The plan as JSON values, in bytes, FLOP and seconds."""
    return asdict(plan) | {
        "activations": plan.activations,
        "peak": plan.peak,
        "peak_bytes": sum(plan.peak.values()),
        "flop": plan.flop,
        "flop_per_example": plan.flop / plan.examples,
        "seconds_per_step": {
            "rate_tflops": tflops,
            "full": plan.seconds(tflops),
            f"{share:g}": plan.seconds(tflops * share),
        },
    }
