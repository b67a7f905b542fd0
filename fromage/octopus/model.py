"""Octopus: a language model that recognises objects in parallel, halfway up, and points at them in sequence.

    [image: P patches] [instruction] [N object queries] [answer: text with index tokens <d0> ... <dN-1>]

Shapes: B batch, T tokens of a prompt, A of an answer, P patches of an image, N object queries, m width of the patch
features, d width of the language model, c width of the DETR decoder.

    visual prefix   W_c  (d x m)   a patch becomes an input embedding
    object queries  (N x d)        input embeddings behind the instruction: they see it, the image and each other
    recognizer      DETR decoder between bottom and top layers: queries -> boxes, scores (fromage.octopus.recognition)
    relay           (N x d)        what was found takes the queries' places in the top layers, each with the name <di>
    index tokens    (N x d)        rows beside the vocabulary (models.special_tokens): to write <di> is to point at box i
    pointer         (c x d, c x m) which box suits the words that an answer is after (fromage.octopus.pointing)

With no queries it is the sequential counterpart: the same towers and data, boxes spelled as text (fromage.octopus.answers).
A reconstruction of Zhao et al., NeurIPS 2024; what is known of it and what is ours stands in docs/octopus.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from fromage.data.tokenizer import IMAGE
from fromage.errors import UserError
from fromage.models.base import VisualPrefixLM, digest, fill
from fromage.models.frozen import digest_of_samples
from fromage.models.language_model import LanguageModel, Quantized, load_lm
from fromage.models.prompts import QUERIES, START, ImageInput, Part, worded
from fromage.models.vision.base import VisionTower
from fromage.models.vision.registry import load_patches
from fromage.octopus.pointing import Aligned, Pointer
from fromage.octopus.recognition import Detections, Recognizer

QUERY = QUERIES.value
SLOTS = re.compile(r"(\{\w+\})")


def index_tokens(n: int) -> list[str]:
    """<d0> ... <dN-1>."""
    return [f"<d{i}>" for i in range(n)]


@dataclass
class Prefill:
    """A batch of prompts that was read, ready for answers.

    Attributes:
        hidden: (B, d) hidden states of the prompts' last tokens, from which the answers' first ones follow.
        cache: keys and values of every layer.
        mask: (B, S) bool, the tokens in the cache that are none of the padding.
        found: what the decoder recognised; None where the prompts have no queries.
        aligned: the words of the prompts, held against what is in each query's box; None likewise.
    """

    hidden: Tensor
    cache: DynamicCache
    mask: Tensor
    found: Detections | None
    aligned: Aligned | None


class Octopus(VisualPrefixLM):
    """The model. What is trained beside the language model is float32 whatever the towers hold.

    Attributes:
        n: object queries; 0 for the sequential counterpart.
        after: layers of the language model below the decoder.
        settings: the arguments of load it was built with; empty if it was built from modules.
    """

    vision: VisionTower

    def __init__(
        self,
        lm: LanguageModel,
        vision: VisionTower,
        n: int = 64,
        after: int | None = None,
        c: int = 256,
        decoder_layers: int = 6,
        heads: int = 8,
        relay: bool = True,
        template: str = "{image}{instruction}{queries}{start}",
    ) -> None:
        """after: None for half of the layers. relay: whether what was found takes the queries' places (an ablation without).

        template: what stands around image, instruction and queries; {start} is the language model's start token. Raises
        UserError for numbers, or a template, that cannot be, and for a language model with a projection between embeddings
        and layers (OPT-350m).
        """
        super().__init__(lm, vision, vision.shape[0])
        self.n, self.after, self.relay = n, len(lm.blocks) // 2 if after is None else after, relay
        self.template = [part for part in SLOTS.split(template.replace("{picture}", "{image}")) if part]  # its former name
        if n and not 0 < self.after < len(lm.blocks):
            raise UserError(f"model.after {after}: the language model has {len(lm.blocks)} layers; choose 1 to one less")
        if n and (inner := getattr(lm.hf.config, "hidden_size", lm.width)) != lm.width:
            raise UserError(
                f"model.lm: its layers are {inner} wide and its embeddings {lm.width}; choose one of equal widths"
            )
        if n and (c % 8 or c % heads or decoder_layers < 1):
            told = f"model.c {c}, heads {heads}, decoder_layers {decoder_layers}"
            raise UserError(f"{told}: c must be a multiple of 8 and of heads, and the layers at least 1")
        named = sorted(part for part in self.template if SLOTS.match(part) and part != "{start}")
        if named != ["{image}", "{instruction}", "{queries}"]:
            raise UserError(f"model.template {template!r}: name {{image}}, {{instruction}} and {{queries}} once each")
        self.visual_prefix = nn.Linear(vision.width, lm.width)  # W_c
        self.index = lm.added  # of <d0> ... <dN-1>
        if n:
            scale = lm.added.mean_norm.cpu() / lm.width**0.5
            self.queries = nn.Parameter(torch.randn(n, lm.width) * scale)  # (N, d)
            if vision.grid is None:
                raise UserError(f"vision tower {vision.name}: gives no patches; load it by load_patches")
            self.recognizer = Recognizer(lm.width, vision.width, vision.grid, n, c, decoder_layers, heads)
            self.pointer = Pointer(lm.width, vision.width, vision.grid, c)
            self._above = (lm.blocks[self.after],)  # the layer behind the decoder, in a tuple lest it be registered twice
        self.settings: dict[str, Any] = {}

    @classmethod
    def load(
        cls,
        lm: str = "toy",
        vision: str = "toy",
        vision_weights: str | None = None,
        vision_layer: int = -2,
        n: int = 64,
        dtype: str = "float32",
        random_weights: bool = False,
        quantize: Quantized | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Octopus:
        """Build from names, what is trained fresh; see load_lm and load_patches for what a name may be.

        options: further arguments of Octopus. The same seed gives the same parameters.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tower = load_patches(vision, vision_weights, vision_layer, dtype, random_weights)
            tokens = {"rows": index_tokens(n), "places": (IMAGE, QUERY)}
            model = cls(load_lm(lm, dtype, random_weights, quantize, **tokens), tower, n, **options)
        model.settings = {"lm": lm, "vision": vision, "vision_weights": vision_weights, "vision_layer": vision_layer}
        model.settings |= {"n": n, "dtype": dtype, "random_weights": random_weights, **options}
        return model

    def fingerprint(self) -> str:
        """16 hex digits that change with any parameter, the language model's too: by which a report names the model."""
        built = (self.vision.fingerprint(), self.lm.name, self.n, self.after, self.relay, self.template)
        return digest("|".join(map(str, (*built, digest_of_samples(self.lm)))), self.trained())

    def prefix(self, features: Tensor) -> Tensor:
        """(B, P, m) patch features -> (B, P, d) input embeddings."""
        return self.visual_prefix(features.float())

    def prompt(self, image: ImageInput | None, instruction: str, ask: bool = True) -> list[Part]:
        """The prompt of an instruction about an image, by the template; ask: whether the queries are in it."""
        return fill_template(self.template, image, instruction, ask and self.n > 0)

    def embed(self, ids: Tensor, prefix: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T, d); places of <|image|> are filled from prefix (B, P, d), of <|query|> by the queries."""
        embeds, places = super().embed(ids, prefix), self.asked(ids)
        if not self.n:
            return embeds
        rows = self.queries.repeat(len(ids), 1)  # (B N, d): more than there are places where some prompts have none
        return fill(embeds, places, rows)

    def asked(self, ids: Tensor) -> Tensor:
        """(B, T) bool: the places of object queries."""
        return ids == self.tokenizer.added[QUERY]

    def words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T) ids and mask -> (B, T) bool: what is neither image, query, start token nor padding."""
        start = -1 if self.tokenizer.bos_id is None else self.tokenizer.bos_id  # -1: no token's id
        return mask & (ids != self.tokenizer.added[IMAGE]) & (ids != start) & ~self.asked(ids)

    def read(self, ids: Tensor, mask: Tensor, embeds: Tensor, patches: Tensor) -> Prefill:
        """Run prompts through both halves.

        ids, mask (B, T), left-padded; embeds (B, T, d); patches (B, P, m), the images that the queries look at. Either
        all prompts have queries, or none.
        """
        places, cache = self.asked(ids), DynamicCache()  # all of every layer, as the masks have it
        with self._recognising(places, patches, self.words(ids, mask)) as found:
            hidden = self.lm.cached(embeds, visible(mask, places), positions(mask), cache)  # (B, T, d)
        if not found:
            return Prefill(hidden[:, -1], cache, mask, None, None)
        return Prefill(hidden[:, -1], cache, mask, *found[0])

    def extend(self, reading: Prefill, ids: Tensor) -> Tensor:
        """(B, A) tokens of answers behind a reading, which grows by them -> (B, A, d) hidden states after each."""
        known = F.pad(reading.mask, (0, ids.shape[1]), value=True)  # (B, S + A)
        causal = torch.ones(ids.shape[1], known.shape[1], dtype=torch.bool, device=ids.device).tril(reading.mask.shape[1])
        mask = (known.unsqueeze(1) & causal).unsqueeze(1)  # (B, 1, A, S + A)
        at = positions(known)[:, -ids.shape[1] :]  # (B, A)
        reading.mask = known
        return self.lm.cached(self.lm.embed(ids), mask, at, reading.cache)

    def logits(self, hidden: Tensor, reading: Prefill) -> Tensor:
        """(B, A, d) hidden states behind a reading -> (B, A, V + 2 + N), in float32.

        An index token is weighed by its row, as any token, by how well what is in its query's box suits the words that the
        hidden state is after (fromage.octopus.pointing), and by the log of its query's score: w_i h + (a S)_i + log s_i. No
        gradient goes through the score: the decoder learns it from the objects, and the top layers what to add to it.
        Without anything recognised there is nothing to point at.
        """
        logits = self.lm.logits(hidden)
        if not self.n:
            return logits
        named = logits[..., -self.n :]  # (B, A, N), a view
        if reading.found is None or reading.aligned is None:
            named.fill_(-torch.inf)
        else:
            named += self.pointer(hidden, reading.aligned) + reading.found.log_scores.detach().unsqueeze(1)
        return logits

    @contextmanager
    def _recognising(self, places: Tensor, patches: Tensor, words: Tensor) -> Iterator[list[tuple[Detections, Aligned]]]:
        """Within, the language model runs in two halves; the list then holds what was found between them."""
        found: list[tuple[Detections, Aligned]] = []

        def between(block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0]  # (B, T, d)
            queries = hidden[places].view(len(hidden), self.n, -1)  # (B N, d) -> (B, N, d)
            recognised = self.recognizer(queries, patches)
            found.append((recognised, self.pointer.align(hidden, words, patches, recognised.boxes[-1])))
            relayed = recognised.relay if self.relay else queries
            names = self.index.input  # (N, d)
            return fill(hidden, places, relayed + names), *args[1:]

        if not self.n or not places.any():
            yield found
            return
        handle = self._above[0].register_forward_pre_hook(between)
        try:
            yield found
        finally:
            handle.remove()


def fill_template(template: Sequence[str], image: ImageInput | None, instruction: str, ask: bool) -> list[Part]:
    """A template in parts -> a prompt, with the queries or without."""
    slots: dict[str, Part | None] = {"{image}": image, "{instruction}": instruction, "{start}": START}
    slots["{queries}"] = QUERIES if ask else None
    parts = [slots.get(part, part) for part in template]
    return worded([part for part in parts if part is not None])


def positions(mask: Tensor) -> Tensor:
    """(B, T) bool -> (B, T): how many tokens stand before each, padding apart."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def visible(mask: Tensor, places: Tensor) -> Tensor:
    """(B, T) bool of tokens, and of the queries among them -> (B, 1, T, T) bool: who (a row) sees whom.

    Each token sees those before it and itself; queries see each other both ways. Padding sees itself, lest it be NaN.
    """
    T = mask.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=mask.device).tril()
    among = places.unsqueeze(1) & places.unsqueeze(2)  # (B, T, T)
    itself = torch.eye(T, dtype=torch.bool, device=mask.device)
    return (((causal | among) & mask.unsqueeze(1)) | itself).unsqueeze(1)
