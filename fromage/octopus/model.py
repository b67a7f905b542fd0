"""Octopus: the prompt, the two halves of the language model, and the relay between them.

    [image: P patches] [instruction] [N object queries] [answer: text with index tokens <d0> ... <dN-1>]

Below split_layer the language model reads image, instruction and queries; then a DETR decoder turns the queries into boxes;
above, the decoder's output takes the queries' places. The legend of shapes is in fromage.models.

Several prompts about one image stand in one row, as branches (fromage.octopus.branches). E prompts with queries in all rows.

    visual prefix   W_c  (d x m)   a patch becomes an input embedding                                           section 4.1
    object queries  (N x d)        input embeddings after the instruction; they see it, the image and each other        3.2
    recognizer                     the DETR decoder: queries -> boxes, scores (fromage.octopus.recognition)             3.2
    relay           (N x d)        decoder output -> hidden states of the queries, plus the embedding of <di>           3.2
    index tokens    (N x d)        trained rows beside the vocabulary (models.special_tokens): <di> points at box i     3.1

Without queries it is the sequential counterpart: the same towers and data, with boxes spelled as text (octopus.answers).
A reconstruction of Zhao et al., NeurIPS 2024; docs/octopus.md says what is known of it and what is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fromage.checkpoints.format import OCTOPUS, TOWERS, Saved, dtype_name
from fromage.config import OctopusConfig
from fromage.data.tokenizer import IMAGE_TOKEN
from fromage.errors import UserError
from fromage.models.base import VisualPrefix, digest
from fromage.models.frozen import digest_of_samples, hold
from fromage.models.language_model import LanguageModel, load_lm
from fromage.models.packed_attention import MaskedAttention
from fromage.models.packed_layout import PackedLayout, to_device
from fromage.models.pretrained import Pretrained
from fromage.models.prompts import ImageInput, Part
from fromage.models.vision.base import VisionTower
from fromage.models.vision.registry import load_patches
from fromage.octopus.branches import Known, among
from fromage.octopus.checkpoint import check_names, upgraded
from fromage.octopus.lora import add_lora
from fromage.octopus.masks import SCALES
from fromage.octopus.queries import QUERY, index_token_names, initial_queries, query_tokens
from fromage.octopus.recognition import Detections, Recognizer
from fromage.octopus.template import check_template, fill_template, parts_of


@dataclass
class Prefill:
    """Prompts after their forward pass, ready for answers.

    Attributes:
        states: (M, d) hidden states of the prompts' tokens.
        ends: (B,) which of them is each row's last.
        known: the tokens so far.
        seen: their keys and values.
        found: the detections of E prompts; None if they have no queries.
    """

    states: Tensor
    ends: Tensor
    known: Known
    seen: MaskedAttention
    found: Detections | None

    @property
    def hidden(self) -> Tensor:
        """(B, d) hidden states of the rows' last tokens: of one prompt a row, they predict the answers' first tokens."""
        return self.states.index_select(0, self.ends)


class Octopus(Pretrained):
    """The model. Trained parameters outside the language model are float32 whatever the dtype of the towers.

    Attributes:
        num_queries: N, object queries; 0 for the sequential counterpart.
        split_layer: layers of the language model below the decoder.
        masks: whether queries have masks too.
        tuned: names of the language model's parameters that were trained; they are saved too.
    """

    kind = OCTOPUS
    config_class = OctopusConfig
    config: OctopusConfig
    vision: VisionTower
    _above: nn.Module

    def __init__(self, lm: LanguageModel, vision: VisionTower, config: OctopusConfig) -> None:
        """Build from two loaded towers; those that config names are not loaded. With lora_rank come adapters.

        Raises UserError for impossible numbers or templates, for masks without queries, and for a language model with a
        projection between embeddings and layers (OPT-350m).
        """
        super().__init__(lm, vision, vision.shape[0])
        self.config, self.num_queries, self.relay = config, config.num_queries, config.relay
        self.split_layer = len(lm.blocks) // 2 if config.split_layer is None else config.split_layer
        self.template = parts_of(config.template)
        self.masks = config.mask_scale > 0
        if self.num_queries:
            _check_queries(lm, vision, self.split_layer, config)
        _check_masks(config)
        check_template(self.template)
        self.visual_prefix = VisualPrefix(vision.width, lm.width)  # W_c: (B, P, m) -> (B, P, d)
        self.index_tokens = lm.added  # (N, d), rows of <d0> ... <dN-1>
        if self.num_queries:
            self.queries = nn.Parameter(initial_queries(lm, self.num_queries))  # (N, d)
            grid: Any = vision.grid
            self.recognizer = Recognizer(
                lm.width, vision.width, grid, self.num_queries, config.decoder_width, config.decoder_layers, config.heads,
                config.mask_scale,
            )  # fmt: skip
            hold(self, "_above", lm.blocks[self.split_layer])  # first layer above the decoder; the LM registers it
        if config.lora_rank:
            add_lora(lm, config.lora_rank)
        self.tuned: set[str] = set()

    @classmethod
    def load_towers(cls, config: OctopusConfig) -> tuple[LanguageModel, VisionTower]:
        """The two frozen towers of a configuration; the tokenizer has its index tokens."""
        dtype = dtype_name(config.dtype)
        vision = load_patches(config.vision, config.vision_weights, config.vision_layer, dtype, config.random_weights)
        tokens = {"rows": index_token_names(config.num_queries), "places": (IMAGE_TOKEN, QUERY)}
        return load_lm(config.lm, dtype, config.random_weights, config.quantize, **tokens), vision

    def saved_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are saved: those outside the towers, and what was trained of the language model."""
        of_lm = {name: p for name, p in self.named_parameters() if name.startswith("lm.")}
        return self.trained() | {name: p for name, p in of_lm.items() if p.requires_grad or name in self.tuned}

    @classmethod
    def upgraded(cls, saved: Saved) -> Saved:
        """As of Pretrained. Raises UserError for a checkpoint of stage 1, which has trained no object queries."""
        return upgraded(saved)

    def load_parameters(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Load saved parameters. Raises UserError for those of another architecture, or of layers quantised here."""
        whole = any(name.startswith("lm.") and "lora_" not in name for name in tensors)
        if whole and self.lm.quantized:
            told = f"its language model was trained itself, and would be held in {self.lm.quantized}"
            raise UserError(f"{source}: {told}; leave out quantize")
        check_names(self, tensors, source)
        self.load_state_dict(dict(tensors), strict=False)
        self.tuned |= {name for name in tensors if name.startswith("lm.")}

    def fingerprint(self, trained: Mapping[str, Tensor] | None = None) -> str:
        """16 hex digits that change with any parameter, the language model's too; they name the model in reports.

        trained: values to use in place of the model's own; of the language model rounded samples count anyway.
        """
        built = (self.vision.fingerprint(), self.lm.name, self.num_queries, self.split_layer, self.relay, self.template)
        own = {name: p for name, p in (trained or self.trained()).items() if not name.startswith(TOWERS)}
        named = {name.replace("index_tokens.", "index."): p for name, p in own.items()}  # as in old reports
        return digest("|".join(map(str, (*built, digest_of_samples(self.lm)))), named)

    def prompt(self, image: ImageInput | None, instruction: str, ask: bool = True) -> list[Part]:
        """The prompt of an instruction about an image, from the template. ask: include the object queries."""
        return fill_template(self.template, image, instruction, query_tokens(self.tokenizer, self.num_queries * ask))

    def embed(self, ids: Tensor, prefix: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T, d); <|image|> tokens take rows of prefix (n, P, d) in order, <|query|> tokens the queries."""
        embeds, places = super().embed(ids, prefix), self.is_query(ids)
        if not self.num_queries:
            return embeds
        number = (places.flatten().cumsum(0) - 1) % self.num_queries  # (B T,)
        rows = self.queries.index_select(0, number).view_as(embeds)  # (B, T, d)
        return torch.where(places.unsqueeze(-1), rows.to(embeds.dtype), embeds)  # (B, T, d)

    def is_query(self, ids: Tensor) -> Tensor:
        """Ids of any shape -> bool: whether a token is an object query."""
        return ids == self.tokenizer.added[QUERY]

    def read(
        self, layout: PackedLayout, embeds: Tensor, patches: Tensor, query_index: Tensor, row_of_prompt: Tensor
    ) -> Prefill:
        """Run prompts through both halves of the language model, with the decoder and the relay between them.

        layout: of the M tokens of B rows, with their branches. embeds (M, d); patches (B, P, m), which the decoder attends
        to. query_index: (E, N) of `query_places`. row_of_prompt: (E,), the rows of these prompts. Either all have
        queries, or none.
        """
        known = Known.of(layout)
        seen = MaskedAttention(layout, among(known.distances_to(known), query_index, layout))
        with self._relaying(query_index, row_of_prompt, patches) as found:
            states = self.lm.packed(embeds.unsqueeze(0), layout.positions, seen)  # (M, d)
        ends = [start + count - 1 for start, count in zip(layout.starts, layout.lengths, strict=True)]
        return Prefill(states, to_device(ends, states.device), known, seen, found[0] if found else None)

    def next_token(self, prefill: Prefill, ids: Tensor) -> Tensor:
        """One more token of each row, ids (B,) -> hidden states (B, d). The prefill grows by them."""
        return self._after(prefill, ids, prefill.known.next(), keep=True)

    def read_answers(self, prefill: Prefill, ids: Tensor, layout: PackedLayout) -> Tensor:
        """All tokens of answers at once, ids (F,) of a layout -> hidden states (F, d). None can follow them."""
        return self._after(prefill, ids, layout, keep=False)

    def _after(self, prefill: Prefill, ids: Tensor, layout: PackedLayout, keep: bool) -> Tensor:
        """Tokens (F,) after those of a prefill -> (F, d). keep: their keys and values, for tokens after them."""
        new = Known.of(layout)
        prefill.known = prefill.known.followed_by(new)
        prefill.seen = MaskedAttention(layout, prefill.known.distances_to(new), prefill.seen, keep=keep)
        return self.lm.packed(self.lm.embed(ids.unsqueeze(0)), layout.positions, prefill.seen)  # (F, d)

    def logits(self, hidden: Tensor, prefill: Prefill) -> Tensor:
        """(..., d) hidden states after a prefill -> (..., V + 2 + N) logits in float32 (equation 5).

        Index tokens are words like any other: row times hidden state. Without detections they have logit -inf.
        """
        logits = self.lm.logits(hidden)
        if self.num_queries and prefill.found is None:
            logits[..., -self.num_queries :] = -torch.inf
        return logits

    @property
    def mask_size(self) -> tuple[int, int] | None:
        """H and W of the masks; None without them."""
        return self.recognizer.masks.size if self.masks else None  # type: ignore[union-attr, return-value]

    @contextmanager
    def _relaying(self, query_index: Tensor, row_of_prompt: Tensor, patches: Tensor) -> Iterator[list[Detections]]:
        """The relay: within this context the language model runs in two halves, with the decoder between them.

        The list receives the detections of the forward pass. The decoder's output, plus the embedding of <di>, replaces the
        hidden states of the queries. Arguments: as of `read`.
        """
        found: list[Detections] = []

        def between(block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            flat = args[0][0]  # (1, M, d) -> (M, d)
            query_states = flat.index_select(0, query_index.flatten()).unflatten(0, query_index.shape)  # (E, N, d)
            detections = self.recognizer(query_states, patches, row_of_prompt)
            found.append(detections)
            relayed = detections.relay if self.relay else query_states
            rows = (relayed + self.index_tokens.input).to(flat.dtype)  # (E, N, d) + (N, d)
            hidden = flat.index_copy(0, query_index.flatten(), rows.flatten(0, 1))  # (M, d)
            return hidden.unsqueeze(0), *args[1:]  # (1, M, d)

        if not len(query_index):
            yield found
            return
        handle = self._above.register_forward_pre_hook(between)
        try:
            yield found
        finally:
            handle.remove()


def _check_queries(lm: LanguageModel, vision: VisionTower, split_layer: int, config: OctopusConfig) -> None:
    """Raise UserError for a decoder that has no place in the language model, no patches, or impossible numbers."""
    if not 0 < split_layer < len(lm.blocks):
        raise UserError(
            f"model.split_layer {split_layer}: the language model has {len(lm.blocks)} layers; choose 1 to one less"
        )
    if (inner := getattr(lm.hf.config, "hidden_size", lm.width)) != lm.width:
        raise UserError(f"model.lm: its layers are {inner} wide and its embeddings {lm.width}; choose one of equal widths")
    width, heads = config.decoder_width, config.heads
    if width % 8 or width % heads:
        told = f"model.decoder_width {width}, heads {heads}"
        raise UserError(f"{told}: decoder_width must be a multiple of 8 and of heads")
    if vision.grid is None:
        raise UserError(f"vision tower {vision.name}: gives no patches; load it by load_patches")


def _check_masks(config: OctopusConfig) -> None:
    if config.mask_scale and not config.num_queries:
        raise UserError("model.mask_scale: masks are of object queries, and model.num_queries is 0; leave it out")
    if config.mask_scale and config.mask_scale not in SCALES:
        raise UserError(f"model.mask_scale {config.mask_scale}: choose {', '.join(map(str, SCALES))}, or 0 for no masks")


def load_octopus(path: str, device: str = "cpu", **options: Any) -> Octopus:
    """Octopus.from_pretrained as a function."""
    return Octopus.from_pretrained(path, device, **options)
