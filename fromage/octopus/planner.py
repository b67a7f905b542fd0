"""The memory planner of Octopus' runs: what fromage.training.memory_planner is for FROMAGe's.

One training step runs on fake tensors, by the code of training itself: Collate lays out rows of equal conversations, and
octopus_step reads and answers them. Only the matching is none, since its costs have no values: object i has query i.

Several devices share memory as fromage.training.strategy has it: ShardedModel where the language model is trained,
ShardedTowers where it is frozen; a quantised one, or one with adapters, is whole on each device (DDP). Each has rows of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM

from fromage.checkpoints.format import DTYPES, dtype_name
from fromage.config import OctopusConfig
from fromage.data.tokenizer import IMAGE_TOKEN
from fromage.errors import UserError
from fromage.models.language_model import LanguageModel
from fromage.models.vision.base import VisionTower
from fromage.models.vision.registry import plan_vision
from fromage.octopus.checkpoint import check_run, of_stage
from fromage.octopus.collate import Collate
from fromage.octopus.examples import Example
from fromage.octopus.lora import add_lora
from fromage.octopus.matching import Objects
from fromage.octopus.model import Octopus
from fromage.octopus.module import choose_trained
from fromage.octopus.queries import QUERY
from fromage.octopus.step import GroundingBatch, image_patches, octopus_step
from fromage.training.config_options import check_choices, options_of, run_of
from fromage.training.layers import checkpoint_blocks
from fromage.training.meter import Meter, attention_in_parts
from fromage.training.plan import LM, TOWER, Plan, of_training, quantized_bytes
from fromage.training.published_sizes import lm_config

PARTS = {
    "lm": LM, "vision": TOWER, "visual_prefix": "W_c", "queries": "queries", "recognizer": "DETR decoder",
    "index_tokens": "index tokens",
}  # fmt: skip
ADAPTERS = "adapters"
MODEL, TOWERS, COPIES = "ShardedModel", "ShardedTowers", "ddp"  # how devices share
SPELLED = 25  # tokens of a box in text, as in the paper


@dataclass(frozen=True, kw_only=True)
class Run(OctopusConfig):
    """The run to plan: options of a configuration, with the defaults of OctopusModule and OctopusData, and lengths."""

    LEAST: ClassVar[Mapping[str, int]] = {
        **OctopusConfig.LEAST, "batch_size": 1, "per_image": 1, "devices": 1, "instruction_tokens": 0, "objects": 0,
    }  # fmt: skip

    stage: int = 1
    activation_checkpointing: bool = False
    batch_size: int = 16  # rows on each device
    per_image: int = 1
    max_steps: int = -1  # -1: unknown
    devices: int = 1
    layers_dtype: str | None = None  # of ShardedModel
    stored_features: bool = False
    instruction_tokens: int = 12
    answer_tokens: int = 24  # with boxes and </s>
    objects: int = 1  # boxes of an answer; none in stage 1

    @property
    def sharing(self) -> str | None:
        """How several devices share memory."""
        if self.devices == 1:
            return None
        if self.stage == 3:
            return COPIES if self.lora_rank else MODEL
        return COPIES if self.quantize else TOWERS


def read_run(config: str | Sequence[str], **options: Any) -> Run:
    """A Run from configuration files; options that are not None override them. Raises UserError for invalid values."""
    found = options_of(config)
    strategy = found.get("strategy")
    found["layers_dtype"] = strategy.get("init_args", {}).get("dtype") if isinstance(strategy, dict) else None
    found["stored_features"] = found.get("features") is not None
    if not isinstance(found.get("devices"), int):  # such as auto: one is planned
        found.pop("devices", None)
    found |= {name: value for name, value in options.items() if value is not None}
    run = run_of(Run, found, config)
    run = replace(run, dtype=dtype_name(run.dtype))
    if run.stage == 1:
        run = replace(run, objects=0)
    run = of_stage(run, run.stage)
    check_choices(run, {"layers_dtype": (None, *DTYPES)})
    check_run(run.stage, run)
    if run.answer_tokens < run.objects + 1 or (run.num_queries and run.objects > run.num_queries):
        raise UserError(
            f"answers of {run.answer_tokens} tokens with {run.objects} boxes and </s>, {run.num_queries} object queries: "
            "give an answer a token for each box and one more, and at most as many boxes as there are queries"
        )
    return run


def plan(run: Run) -> Plan:
    """Run one step on fake tensors and count. Raises UserError if a tower's configuration is not found."""
    with attention_in_parts():
        tower, fake = plan_vision(run.vision, run.dtype, run.vision_layer), FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            model = build(run, tower)
        if run.lora_rank:
            add_lora(model.lm, run.lora_rank, empty=True)
        with fake:
            renew(model.lm, lambda p: torch.empty_like(p, device="cpu") if p.is_meta else p)
        prepare(run, model)
        weights, batch = weights_of(run, model), lay_out(run, model)
        fields, objects = (tree_map_only(Tensor, fake.from_tensor, d) for d in (batch._asdict(), vars(batch.objects)))
        with fake:
            if run.sharing == MODEL and run.layers_dtype:
                run_layers_in(model.lm, DTYPES[run.layers_dtype])
            return count(run, model, GroundingBatch(**fields | {"objects": Objects(**objects)}), weights)


def build(run: Run, tower: VisionTower) -> Octopus:
    """The model of a run, from a vision tower on the meta device, without adapters."""
    hf = AutoModelForCausalLM.from_config(lm_config(run.lm), dtype=DTYPES[run.dtype])
    words: Any = Words(len(hf.get_input_embeddings().weight), run.num_queries)
    tower.to_empty(device="cpu").normalise = None  # it looks at values
    return Octopus(LanguageModel(hf, words, run.lm), tower, replace(run, lora_rank=0))


def prepare(run: Run, model: Octopus) -> None:
    """Let a model train as the run does."""
    choose_trained(model, run.stage, whole=not run.lora_rank)
    if run.activation_checkpointing:
        checkpoint_blocks(model.lm)


class Words:
    """In place of a tokenizer: each word is a token, a spelled box SPELLED of them; vocab_size is that of the embedding."""

    pad_id, eos_id, ret_ids = 0, 2, ()

    def __init__(self, vocab_size: int, num_queries: int) -> None:
        self.vocab_size = vocab_size
        self.added = {IMAGE_TOKEN: vocab_size, QUERY: vocab_size + 1}
        self.image_id = vocab_size
        self.trained_ids = [vocab_size + 2 + i for i in range(num_queries)]

    def encode(self, text: str) -> list[int]:
        """As PromptTokenizer."""
        return [3] * sum(SPELLED if word.startswith("[") else 1 for word in text.split())

    def start(self) -> list[int]:
        """As PromptTokenizer."""
        return [1]


def lay_out(run: Run, model: Octopus) -> GroundingBatch:
    """A batch of the run's size, by Collate."""
    words, boxes = run.answer_tokens - run.objects - 1, tuple((i / 1000, 0.2, 0.5, 0.6) for i in range(run.objects))
    asked, answer = " ".join(["word"] * run.instruction_tokens), (" ".join(["word"] * words), *range(run.objects))
    row = [[Example(str(number), "", asked, answer, boxes)] for number in range(run.per_image)]
    patches = torch.zeros(model.vision.shape, dtype=torch.bfloat16)
    pixels = torch.zeros(3, *model.vision.image_size, dtype=torch.uint8)
    shown = patches if run.stored_features else pixels
    batch = Collate(model, run.stored_features, ask=run.stage > 1)([(row, shown)] * run.batch_size)
    if model.mask_size is None or not run.objects:
        return batch
    known = torch.ones(batch.objects.boxes.shape[:2]).nonzero().T  # (2, E K): the mask of every object
    objects = replace(batch.objects, masks=torch.zeros(known.shape[1], *model.mask_size), masked=known)
    return batch._replace(objects=objects)


def in_order(logits: Tensor, boxes: Tensor, objects: Objects) -> Tensor:
    """A matching (L, E, K) without a look at values: object i has query i."""
    return torch.arange(objects.boxes.shape[1], device=logits.device).expand(*logits.shape[:-1], -1)


class Weight(NamedTuple):
    """A parameter: where it belongs, and its bytes."""

    part: str
    numbers: int
    size: int
    item: int  # bytes of a number, when it is used
    inside: bool  # in a layer of the language model
    trained: bool


def weights_of(run: Run, model: Octopus) -> list[Weight]:
    """All parameters."""
    inside, found = {p for block in model.lm.blocks for p in block.parameters()}, []
    for name, p in model.named_parameters():
        adapter = "lora_" in name
        quantized = bool(run.quantize) and p in inside and p.ndim == 2 and not adapter
        size = quantized_bytes(p, run.quantize) if quantized else p.nbytes
        part = ADAPTERS if adapter else PARTS[name.partition(".")[0]]
        found.append(Weight(part, p.numel(), size, p.itemsize, p in inside, p.requires_grad))
    return found


def count(run: Run, model: Octopus, batch: GroundingBatch, weights: Sequence[Weight] | None = None) -> Plan:
    """The plan of a model and a batch, of real or fake tensors; weights: those that are held, if not the model's own."""
    weights = weights_of(run, model) if weights is None else weights
    parts = [part for part in (*PARTS.values(), ADAPTERS) if any(w.part == part for w in weights)]
    parameters, sizes, frozen = (dict.fromkeys(parts, 0) for _ in range(3))
    for w in weights:
        parameters[w.part] += w.numbers
        sizes[w.part] += w.size
    trained = [w for w in weights if w.trained]
    for w in weights:
        frozen[w.part] += 0 if w.trained else w.size // share(run, w)
    held = {part: n for part, n in frozen.items() if n} | of_training(sum(w.size // share(run, w) for w in trained))
    grads = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    for p, grad in zip((p for p in model.parameters() if p.requires_grad), grads, strict=True):
        p.grad = grad  # as in the second of several steps of an update
    given = [t for t in tree_leaves((batch, vars(batch.objects))) if isinstance(t, Tensor)]
    meter = Meter([*model.parameters(), *model.buffers(), *given, *grads])
    if batch.pixels is not None:
        batch = batch._replace(pixels=None, patches=meter.run("the vision tower", lambda: image_patches(model, batch)))
    loss = meter.run("the forward", lambda: octopus_step(model, batch, in_order).loss)
    meter.run("the backward", loss.backward)
    many, trained_bytes = sum(w.numbers for w in trained), sum(w.size for w in trained)
    return Plan(
        run=run, heading=heading(run, batch), examples=run.batch_size * run.per_image, max_steps=run.max_steps,
        parameters=parameters, trained=many, trained_bytes=trained_bytes, weights=sizes, held=held,
        batch=sum(t.nbytes for t in given), transient={}, beside=beside(run, model, weights), passes=meter.passes,
        devices=run.devices,
    )  # fmt: skip


def share(run: Run, weight: Weight) -> int:
    """On how many devices a weight is spread."""
    spread = {MODEL: weight.inside or weight.trained, TOWERS: weight.inside}.get(run.sharing or "", False)
    return run.devices if spread else 1


def beside(run: Run, model: Octopus, weights: Sequence[Weight]) -> dict[str, int]:
    """Bytes of weights in another form, and of gradients on their way to other devices."""
    layers = len(model.lm.blocks)
    inside = sum(w.numbers for w in weights if w.inside) // layers  # numbers of a layer
    item = DTYPES[run.layers_dtype].itemsize if run.layers_dtype else max(w.item for w in weights if w.inside)
    outside = sum(w.size for w in weights if w.trained and not w.inside)
    found: dict[str, int] = {}
    if run.quantize:
        found["a weight, dequantised"] = max(p.nbytes for block in model.lm.blocks for p in block.parameters())
    if run.sharing in (MODEL, TOWERS):
        found["two layers, gathered"] = 2 * inside * item
    if run.sharing == MODEL:
        found["trained parameters outside the layers, gathered"] = outside
        found["their gradients, until they are summed"] = outside
        found["gradients of a layer, until they are summed"] = inside * (item + 4)
    elif run.sharing:
        found["gradients in DDP's buckets"] = sum(w.size for w in weights if w.trained)
    return found


def heading(run: Run, batch: GroundingBatch) -> str:
    """The run in words."""
    more = f", layers in {run.quantize}" * bool(run.quantize) + ", layers recomputed" * run.activation_checkpointing
    more += f", adapters of rank {run.lora_rank}" * bool(run.lora_rank)
    more += f", layers gathered in {run.layers_dtype}" * (run.sharing == MODEL and bool(run.layers_dtype))
    more += f"; {run.devices} devices ({run.sharing})" * (run.devices > 1)
    shown, pointed = "stored patches" if run.stored_features else "pixels", "boxes and masks" if run.mask_scale else "boxes"
    return (
        f"{run.lm} and {run.vision} in {run.dtype}, stage {run.stage}{more}; {run.batch_size} rows of {shown} and "
        f"{run.per_image} conversations, instructions of {run.instruction_tokens} tokens, answers of {run.answer_tokens} "
        f"with {run.objects} {pointed}: {(len(batch.prompts.ids) + len(batch.fed.ids)) // run.batch_size} tokens a row"
    )


def renew(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change the parameters of a module; Module.to does not change fake ones."""
    for owner in module.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            if (new := change(p)) is not p:
                setattr(owner, name, nn.Parameter(new.detach(), p.requires_grad))


def run_layers_in(lm: LanguageModel, dtype: torch.dtype) -> None:
    """Layers as ShardedModel gathers them: weights and input in a dtype, the output of the last one as it was."""
    outer = lm.dtype

    def cast(block: nn.Module, args: Any, named: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, named))

    for block in lm.blocks:
        renew(block, lambda p: p.to(dtype))
        block.register_forward_pre_hook(cast, prepend=True, with_kwargs=True)
    lm.blocks[-1].register_forward_hook(lambda block, args, out: out.to(outer))
