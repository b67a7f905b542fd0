"""The memory planner: parameters, memory, work and time of a run, before anything is downloaded.

One training step, forward and backward, runs on fake tensors, which have a shape but no storage (training.meter). It is the
code of training itself, so the counts hold for any language model and vision tower. Memory that autograd keeps is listed by
the module that keeps it: an attention keeps queries, keys, values, output and log-sum-exp; a layer norm its input; an
activation its input or output; a frozen linear layer nothing, since its backward needs the weight only.

Not counted: libraries of the device, scratch memory of kernels, fragmentation, elementwise work, several devices.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import open_clip
import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig

from fromage.checkpoints.format import DTYPES
from fromage.data.batches import Batch
from fromage.errors import UserError
from fromage.models.fromage import Fromage
from fromage.models.frozen import TOY
from fromage.models.language_model import LanguageModel, Quantized
from fromage.models.vision.open_clip import OpenClipTower
from fromage.training.configs import present_step
from fromage.training.fast_step import captioning, fast_step, retrieval_text
from fromage.training.layers import checkpoint_blocks
from fromage.training.losses import CHUNK, info_nce
from fromage.training.meter import Meter, Pass
from fromage.training.reference_step import image_features, reference_step

# layers, width, heads: Zhang et al., "OPT: Open Pre-trained Transformer Language Models", 2022, table 1
OPT = {
    "125m": (12, 768, 12), "350m": (24, 1024, 16), "1.3b": (24, 2048, 32), "2.7b": (32, 2560, 32), "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40), "30b": (48, 7168, 56), "66b": (64, 9216, 72),
}  # fmt: skip
LM, TOWER = "language model", "image tower"
PARTS = {
    "lm": LM, "vision": TOWER, "visual_prefix": "W_c", "text_head": "W_t", "image_head": "W_i", "ret": "[RET]",
    "logit_scale": "scale",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The run to plan: options of a configuration, with the defaults of FromageModule and CC3M, and caption lengths."""

    lm: str = "facebook/opt-6.7b"
    vision: str = "ViT-L-14"
    k: int = 1
    q: int = 256
    dtype: str = "bfloat16"
    step: str = "fast"
    batch_size: int = 180
    max_tokens: int = 24  # length of the longest caption, including </s> and [RET]
    max_steps: int = -1  # -1: unknown
    tokens: float = 13.0  # mean length of a caption, including </s>, without [RET]
    stored_features: bool = False
    chunk: int = 0
    activation_checkpointing: bool = False
    quantize: str | None = None
    freeze_temperature: bool = False


@dataclass
class Plan:
    """Counts of parameters by part, bytes, and FLOP per step, of one device.

    Attributes:
        trained: number of trained parameters; all are float32.
    """

    run: Run
    parameters: dict[str, int]
    trained: int
    weights: dict[str, int]  # bytes by part
    batch: int  # bytes
    transient: dict[str, int]  # bytes of large tensors that no backward needs; included in the passes
    dequantized: int  # bytes of the largest frozen weight, dequantised for use; 0 without quantisation
    passes: dict[str, Pass]

    @property
    def activations(self) -> dict[str, int]:
        """Bytes kept for the backward, by pass."""
        return {name: sum(p.kept.values()) for name, p in self.passes.items() if p.kept}

    @property
    def peak(self) -> dict[str, int]:
        """Bytes at the peak of memory, by part."""
        names, trained = list(self.passes), 4 * self.trained
        last = max(names, key=lambda name: self.passes[name].peak)
        kept = {name: n for name, n in self.activations.items() if names.index(name) <= names.index(last)}
        return {
            **{part: self.weights[part] for part in (LM, TOWER)},
            **{"trained parameters": trained, "their gradients": trained, "their Adam moments": 2 * trained},
            "batch": self.batch,
            **{f"kept by {name}": n for name, n in kept.items()},
            f"transient in {last}": self.passes[last].peak - sum(kept.values()),
            **({"a weight, dequantised": self.dequantized} if self.dequantized else {}),
        }

    @property
    def flop(self) -> int:
        """FLOP of a step, two per multiply-add."""
        return sum(p.flop for p in self.passes.values())

    def seconds(self, tflops: float) -> float:
        """Time of a step, in seconds, at a sustained rate in TFLOP/s."""
        return self.flop / (tflops * 1e12)


def read_run(config: str, **options: Any) -> Run:
    """A Run from a configuration file; options that are not None override it. Raises UserError for invalid values."""
    tree = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for section in (tree.get(name) for name in ("trainer", "model", "data")):
        found |= section.get("init_args", section) if isinstance(section, dict) else {}
    found |= {name: value for name, value in options.items() if value is not None}
    found["step"] = present_step(found.get("step", Run.step))
    kinds: dict[str, Any] = {f.name: str if f.default is None else type(f.default) for f in fields(Run)}
    given = {name: (kind, found[name]) for name, kind in kinds.items() if found.get(name) is not None}
    run = Run(**{name: _as(kind, value, f"configuration {config}: {name}") for name, (kind, value) in given.items()})
    choices = {"dtype": tuple(DTYPES), "step": ("fast", "reference"), "quantize": (None, *get_args(Quantized))}
    for name, known in choices.items():
        if getattr(run, name) not in known:
            raise UserError(f"{name} {getattr(run, name)}: choose one of {', '.join(filter(None, known))}")
    if run.batch_size < 1 or not 1 <= run.tokens <= run.max_tokens - 1:
        raise UserError(
            f"batches of {run.batch_size}, captions of {run.tokens:g} tokens and [RET], the longest {run.max_tokens}: "
            "give a batch size from 1 on, and tokens from 1 to one less than max_tokens"
        )
    return run


def _as(kind: type, value: Any, name: str) -> Any:
    """A value of a configuration as a kind of number, or a text."""
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        wanted = {int: "a whole number", float: "a number"}.get(kind, "a text")
        raise UserError(f"{name} is {str(value)[:40]!r}, not {wanted}") from error


def plan(run: Run) -> Plan:
    """Run one step on fake tensors and count. Raises UserError if a tower's configuration is not found."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one opaque operation, which hides its work and memory
    try:
        visual = _image_tower(run)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = _model(run, visual)
            if run.activation_checkpointing:
                checkpoint_blocks(model.lm)
            batch = _batch(run, model)
        return count(run, model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def count(run: Run, model: Fromage, batch: Batch) -> Plan:
    """The plan of a model and a batch, of real or fake tensors."""
    parameters, weights = dict.fromkeys(PARTS.values(), 0), Counter[str]()
    for name, p in model.named_parameters():
        part = PARTS[name.partition(".")[0]]
        parameters[part] += p.numel()
        weights[part] += p.nbytes
    linear = [p for block in model.lm.blocks for p in block.parameters() if p.ndim == 2] if run.quantize else []
    weights[LM] += sum(_quantized(p, run.quantize) - p.nbytes for p in linear)
    given = [t for t in (batch.ids, batch.pixels, batch.features) if t is not None]
    meter = Meter([*model.parameters(), *model.buffers(), *given])
    transient = {}
    if run.step == "fast" and not run.chunk:
        _fast(meter, model, batch)
        transient = {
            "keys and values of the text pass": _keys_and_values(model, batch),
            "a chunk of logits": _logits(model, batch),
        }
    else:
        step = reference_step if run.step == "reference" else partial(fast_step, chunk=run.chunk)
        loss = meter.run("the forward", lambda: step(model, batch, paired=False).loss)
        meter.run("the backward", loss.backward)
    largest = max((p.nbytes for p in linear), default=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Plan(run, parameters, trained, dict(weights), sum(t.nbytes for t in given), transient, largest, meter.passes)


def _quantized(weight: Tensor, kind: str | None) -> int:
    """Bytes of a weight in bitsandbytes' format: int8 with a float32 scale per row, or NF4 with a byte per block of 64 and
    a float32 scale per 256 blocks (Dettmers et al., "QLoRA", 2023, section 3)."""
    n = weight.numel()
    return n + 4 * weight.shape[0] if kind == "int8" else n // 2 + n // 64 + 4 * (n // (64 * 256))


def _fast(meter: Meter, model: Fromage, batch: Batch) -> None:
    """The parts of fast_step, unpaired; paired captions need no more memory."""
    features = meter.run("the image tower", lambda: image_features(model, batch))
    caption_loss, _ = meter.run("captioning", lambda: captioning(model, batch, features, paired=False))
    text_loss, at_ret = meter.run("the text pass", lambda: retrieval_text(model, batch))
    contrastive = meter.run(
        "the contrastive loss",
        lambda: info_nce(model.embed_images(features), model.embed_ret(at_ret), model.logit_scale)[0],
    )
    loss = caption_loss + text_loss + contrastive
    meter.run("the backward", loss.backward)


def _keys_and_values(model: Fromage, batch: Batch) -> int:
    """Bytes of the keys and values that the text pass caches for its [RET] tokens, including padding."""
    c = model.lm.hf.config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    places = len(batch.lengths) * (max(batch.lengths) - 1)
    return 2 * c.num_hidden_layers * places * heads * width * model.lm.dtype.itemsize


def _logits(model: Fromage, batch: Batch) -> int:
    """Bytes of the float32 logits (c, V) that are computed at a time."""
    return 4 * min(CHUNK, sum(batch.lengths) - len(batch.lengths)) * model.lm.added.vocab_size


def _image_tower(run: Run) -> Any:
    """An open_clip vision tower on the meta device."""
    source = f"local-dir:{TOY / 'clip'}" if run.vision == "toy" else run.vision
    precision = {"float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}[run.dtype]
    logging.disable(logging.WARNING)  # open_clip warns that there are no weights
    try:
        with torch.device("meta"):
            return open_clip.create_model(source, load_weights=False, precision=precision, device="meta").visual
    except Exception as error:
        raise UserError(
            f"image tower {run.vision}: neither a model of open_clip nor a configuration within reach; "
            "python -c 'import open_clip; print(open_clip.list_models())' names them"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def lm_config(name: str) -> Any:
    """The configuration of a causal LM: from a folder, from OPT's published sizes by name, or from the hub."""
    folder, size = TOY / "opt" if name == "toy" else Path(name), name.removeprefix("facebook/opt-")
    if not folder.is_dir() and size in OPT:
        layers, width, heads = OPT[size]
        odd: dict[str, Any] = {"do_layer_norm_before": False} if size == "350m" else {}
        return OPTConfig(
            num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, ffn_dim=4 * width,
            word_embed_proj_dim=512 if size == "350m" else width, **odd,
        )  # fmt: skip
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else name)
    except Exception as error:
        raise UserError(
            f"language model {name}: no configuration on disk or within reach; give a folder with its config.json, "
            f"or one of {', '.join('facebook/opt-' + size for size in OPT)}"
        ) from error


def _model(run: Run, visual: Any) -> Fromage:
    hf = AutoModelForCausalLM.from_config(lm_config(run.lm), dtype=DTYPES[run.dtype])
    rows = len(hf.get_input_embeddings().weight)
    tokens: Any = SimpleNamespace(
        vocab_size=rows, image_id=rows, ret_id=rows + 1, row_ids=[rows + 1], pad_id=0, start=lambda: [0]
    )
    clip = SimpleNamespace(visual=visual.to_empty(device="cpu"))
    model = Fromage(LanguageModel(hf, tokens, run.lm), OpenClipTower(clip, None, run.vision), run.k, run.q)
    model.logit_scale.requires_grad_(not run.freeze_temperature)
    return model


def caption_lengths(run: Run) -> list[int]:
    """Lengths of a batch's captions, including [RET]: one of the maximum length, the others equal, with the given mean."""
    most, others = run.max_tokens - 1, run.batch_size - 1
    rest = max(round(run.batch_size * run.tokens) - most, others)
    return [most + 1, *((rest + i) // others + 1 for i in range(others))]


def _batch(run: Run, model: Fromage) -> Batch:
    lengths, B = caption_lengths(run), run.batch_size
    ids = torch.zeros(B, max(lengths), dtype=torch.long)  # (B, T)
    if run.stored_features:
        return Batch([], [], ids, lengths, None, torch.zeros(B, model.vision.width))
    return Batch([], [], ids, lengths, torch.zeros(B, 3, *model.vision.image_size, dtype=torch.uint8), None)


def report(plan: Plan, tflops: float, share: float) -> str:
    """The plan as text. tflops: peak rate of the device; share: the part of it (0 to 1) that training reaches."""
    run = plan.run
    what = "stored features" if run.stored_features else "images"
    kept = {f"{name}: {module}": n for name, p in plan.passes.items() for module, n in p.kept.items() if n >= 2**20}
    within = {f"  of this, {name}": n for name, n in plan.transient.items()}
    more = f", layers in {run.quantize}" * bool(run.quantize) + ", layers recomputed" * run.activation_checkpointing
    more += f", {run.chunk} examples at a time" * bool(run.chunk)
    lines = [
        f"{run.lm} and {run.vision} in {run.dtype}{more}, {run.step} step; {run.batch_size} {what}, captions of "
        f"{run.tokens:g} tokens and [RET], the longest {run.max_tokens}",
        _row("\nPARAMETERS", "number", "GiB"),
        *(_row(name, f"{n:,}", plan.weights[name]) for name, n in plan.parameters.items()),
        _row("all", f"{sum(plan.parameters.values()):,}", sum(plan.weights.values())),
        _row("trained", f"{plan.trained:,}", 4 * plan.trained),
        _row("\nKEPT FOR THE BACKWARD", "", "GiB"),
        *(_row(name, "", n) for name, n in kept.items()),
        _row("all", "", sum(plan.activations.values())),
        _row("\nPASSES OF A STEP, and what they need beside", "TFLOP", "GiB"),
        *(_row(name, f"{p.flop / 1e12:.3g}", p.transient) for name, p in plan.passes.items()),
        *(_row(name, "", n) for name, n in within.items()),
        _row("\nPEAK MEMORY, without the device's libraries", "", "GiB"),
        *(_row(name, "", n) for name, n in plan.peak.items()),
        _row("all", "", sum(plan.peak.values())),
    ]
    return "\n".join([*lines, "", *_work(plan, tflops, share)])


def _row(name: str, cell: str, size: int | str) -> str:
    """A line of a table. size: bytes, or the title of the column."""
    width = 48 + name.startswith("\n")
    return f"{name:{width}}{cell:>16}" + (f"{size:>10}" if isinstance(size, str) else f"{size / 2**30:10.3f}")


def _work(plan: Plan, tflops: float, share: float) -> Iterator[str]:
    steps = plan.run.max_steps
    yield f"WORK  {plan.flop / 1e12:.3g} TFLOP a step, {plan.flop / plan.run.batch_size / 1e9:.4g} GFLOP an example" + (
        f", {plan.flop * steps / 1e18:.3g} EFLOP in {steps:,} steps" if steps > 0 else ""
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
        "flop_per_example": plan.flop / plan.run.batch_size,
        "seconds_per_step": {
            "rate_tflops": tflops,
            "full": plan.seconds(tflops),
            f"{share:g}": plan.seconds(tflops * share),
        },
    }
