"""The memory planner: parameters, memory, work and time of a run, before anything is downloaded.

One training step, forward and backward, runs on fake tensors, which have a shape but no storage (training.meter). It is the
code of training itself, so the counts hold for any language model and vision tower. Memory that autograd keeps is listed by
the module that keeps it: an attention keeps queries, keys, values, output and log-sum-exp; a layer norm its input; an
activation its input or output; a frozen linear layer nothing, since its backward needs the weight only.

Not counted: libraries of the device, scratch memory of kernels, fragmentation, elementwise work, several devices. Tuples are
planned with target images; where CLIP's text embeddings stand for these, its text tower is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from fromage.checkpoints.format import DTYPES, dtype_name
from fromage.config import FromageConfig
from fromage.data.batches import Batch
from fromage.data.sample_images import Images
from fromage.data.tuples import TupleBatch
from fromage.errors import UserError
from fromage.models.fromage import Fromage
from fromage.models.language_model import LanguageModel
from fromage.models.vision.base import VisionTower
from fromage.models.vision.registry import plan_vision
from fromage.training.config_options import check_choices, options_of, run_of
from fromage.training.fast_composition import fast_composition
from fromage.training.fast_step import fast_step
from fromage.training.layers import checkpoint_blocks
from fromage.training.losses import positions_at_a_time
from fromage.training.meter import Meter, attention_in_parts
from fromage.training.plan import LM, TOWER, Plan, of_training, quantized_bytes
from fromage.training.published_sizes import lm_config
from fromage.training.reference_step import reference_step
from fromage.training.step import LossWeights, count_targets, freeze_unused

PARTS = {
    "lm": LM, "vision": TOWER, "visual_prefix": "W_c", "text_head": "W_t", "image_head": "W_i", "ret": "[RET]",
    "fusion": "fusion of [RET]", "logit_scale": "scale",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run(FromageConfig):
    """The run to plan: options of a configuration, with the defaults of FromageModule and CC3M, and caption lengths."""

    LEAST: ClassVar[Mapping[str, int]] = {**FromageConfig.LEAST, "batch_size": 1}

    step: str = "fast"
    batch_size: int = 180
    max_tokens: int = 24  # length of the longest caption, including </s> and all [RET]
    max_steps: int = -1  # -1: unknown
    tokens: float = 13.0  # mean length of a caption, including </s>, without [RET]
    stored_features: bool = False
    chunk: int = 0
    activation_checkpointing: bool = False
    freeze_temperature: bool = False
    captioning_weight: float = 1.0
    captioned_share: float = 1.0
    retrieval_weight: float = 1.0
    composition_captioning_weight: float = 0.0
    composition_retrieval_weight: float = 0.0
    tuple_batch_size: int | None = None  # None: batch_size; conditions and target captions are planned as long as captions

    @property
    def weights(self) -> LossWeights:
        """Of the losses."""
        return LossWeights(
            captioning=self.captioning_weight,
            retrieval=self.retrieval_weight,
            composition_captioning=self.composition_captioning_weight,
            composition_retrieval=self.composition_retrieval_weight,
            captioned_share=self.captioned_share,
        )


def read_run(config: str | Sequence[str], **options: Any) -> Run:
    """A Run from configuration files; options that are not None override them. Raises UserError for invalid values."""
    found = options_of(config) | {name: value for name, value in options.items() if value is not None}
    run = run_of(Run, found, config)
    run = replace(run, dtype=dtype_name(run.dtype))
    check_choices(run, {"step": ("fast", "reference")})
    if not 1 <= run.tokens <= run.max_tokens - run.r:
        raise UserError(f"{_captions(run)}: give tokens from 1 to max_tokens without [RET]")
    if run.chunk and run.step == "reference":
        raise UserError("step reference: does not run in chunks; leave out model.chunk, or take step fast")
    if run.weights.composes and run.step == "reference":
        raise UserError("step reference: what it takes to learn from tuples is planned for step fast alone")
    return run


def plan(run: Run) -> Plan:
    """Run one step on fake tensors and count. Raises UserError if a tower's configuration is not found."""
    with attention_in_parts():
        tower = plan_vision(run.vision, run.dtype)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = _model(run, tower)
            if run.activation_checkpointing:
                checkpoint_blocks(model.lm)
            batch = _batch(run, model)
            if run.weights.composes:
                batch = batch._replace(tuples=_tuples(run, model))
        return count(run, model, batch)


def count(run: Run, model: Fromage, batch: Batch) -> Plan:
    """The plan of a model and a batch, of real or fake tensors."""
    parameters, weights = dict.fromkeys(PARTS.values(), 0), Counter[str]()
    for name, p in model.named_parameters():
        part = PARTS[name.partition(".")[0]]
        parameters[part] += p.numel()
        weights[part] += p.nbytes
    parameters = {part: count for part, count in parameters.items() if count}
    linear = [p for block in model.lm.blocks for p in block.parameters() if p.ndim == 2] if run.quantize else []
    weights[LM] += sum(quantized_bytes(p, run.quantize) - p.nbytes for p in linear)
    given = [t for t in (batch.ids, batch.pixels, batch.features) if t is not None]
    if batch.tuples is not None:
        given += [t for t in (*batch.tuples, *(batch.tuples.target_images or ())) if isinstance(t, torch.Tensor)]
    meter = Meter([*model.parameters(), *model.buffers(), *given])
    in_parts = run.step == "fast" and not run.chunk  # of a chunked step the backward runs each part again
    step = reference_step if run.step == "reference" else partial(fast_step, chunk=run.chunk)
    forward = partial(step, model, batch, paired=False, weights=run.weights)  # pairs need no more memory
    loss = meter.run(None if in_parts else "the forward", lambda: forward().loss)
    if (tuples := batch.tuples) is not None:
        loss = loss + meter.run("the tuples", lambda: fast_composition(model, tuples, run.weights, chunk=run.chunk).loss)
    meter.run("the backward", loss.backward)
    transient = {"a chunk of logits": _logits(model, batch)} if in_parts else {}
    if in_parts and run.weights.runs_retrieval:
        transient["keys and values of the text pass"] = _keys_and_values(model, batch)
    largest = max((p.nbytes for p in linear), default=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = {part: weights[part] for part in (LM, TOWER)} | of_training(4 * trained)  # trained parameters are float32
    return Plan(
        run=run, heading=_heading(run), examples=run.batch_size, max_steps=run.max_steps, parameters=parameters,
        trained=trained, trained_bytes=4 * trained, weights=dict(weights), held=held, batch=sum(t.nbytes for t in given),
        transient=transient, beside={"a weight, dequantised": largest} if largest else {}, passes=meter.passes,
    )  # fmt: skip


def _heading(run: Run) -> str:
    what = "stored features" if run.stored_features else "images"
    more = f", layers in {run.quantize}" * bool(run.quantize) + ", layers recomputed" * run.activation_checkpointing
    more += f", {run.chunk} examples at a time" * bool(run.chunk)
    more += f", {run.tuple_batch_size or run.batch_size} tuples" * run.weights.composes
    return f"{run.lm} and {run.vision} in {run.dtype}{more}, {run.step} step; {run.batch_size} {what}, {_captions(run)}"


def _captions(run: Run) -> str:
    several = f"{run.r} {run.ret_attention} " * (run.r > 1)
    return f"captions of {run.tokens:g} tokens and {several}[RET], the longest {run.max_tokens}"


def _keys_and_values(model: Fromage, batch: Batch) -> int:
    """Bytes of the keys and values that the text pass caches for its [RET] tokens, including padding."""
    c = model.lm.hf.config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    places = len(batch.lengths) * (max(batch.lengths) - model.r)
    return 2 * c.num_hidden_layers * places * heads * width * model.lm.dtype.itemsize


def _logits(model: Fromage, batch: Batch) -> int:
    """Bytes of the float32 logits (c, V) that are computed at a time."""
    return 4 * positions_at_a_time(count_targets(model, batch)) * model.lm.added.vocab_size


def _model(run: Run, tower: VisionTower) -> Fromage:
    hf = AutoModelForCausalLM.from_config(lm_config(run.lm), dtype=DTYPES[run.dtype])
    rows = len(hf.get_input_embeddings().weight)
    ret = [rows + 1 + i for i in range(run.r)]
    tokens: Any = SimpleNamespace(
        vocab_size=rows, image_id=rows, ret_id=ret[0], ret_ids=ret, trained_ids=ret, pad_id=0, start=lambda: [0]
    )
    tower.to_empty(device="cpu").normalise = None  # it looks at values
    model = Fromage(LanguageModel(hf, tokens, run.lm), tower, replace(run, space="learned"))
    model.config = run  # where the space is CLIP's, the projection has no weights here
    freeze_unused(model, run.weights, run.freeze_temperature)
    return model


def caption_lengths(run: Run) -> list[int]:
    """Lengths of a batch's captions, including [RET]: one of the maximum length, the others equal, with the given mean."""
    most, others = run.max_tokens - run.r, run.batch_size - 1
    rest = max(round(run.batch_size * run.tokens) - most, others)
    return [most + run.r, *((rest + i) // others + run.r for i in range(others))]


def _batch(run: Run, model: Fromage) -> Batch:
    lengths, B = caption_lengths(run), run.batch_size
    ids = torch.zeros(B, max(lengths), dtype=torch.long)  # (B, T)
    if run.stored_features:
        return Batch([], [], ids, lengths, None, torch.zeros(B, model.vision.width))
    return Batch([], [], ids, lengths, torch.zeros(B, 3, *model.vision.image_size, dtype=torch.uint8), None)


def _tuples(run: Run, model: Fromage) -> TupleBatch:
    """Tuples with target images; with those of stored features, features."""
    run = replace(run, batch_size=run.tuple_batch_size or run.batch_size)
    batch, lengths = _batch(run, model), caption_lengths(run)
    said = [n - run.r for n in lengths]  # tokens of each target caption
    shown = Images(batch.pixels, batch.features)
    captions = torch.zeros(len(said), max(said), dtype=torch.long)  # (B, T')
    keys, rows = [""] * len(said), [*range(len(said))]
    return TupleBatch(keys, keys, batch.ids, lengths, captions, said, batch.pixels, batch.features, rows, shown)
