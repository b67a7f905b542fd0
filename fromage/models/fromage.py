"""FROMAGe: a frozen language model and a frozen vision tower with 5.5 million trained parameters between them.

The trained parameters (the legend of shapes is in fromage.models):

    visual prefix   W_c  (d k x m)   image features -> k input embeddings                           section 3.1
    [RET]           e    (r x d)     asks for an image; see fromage.models.special_tokens           section 3.2
    text head       W_t  (q x d)     hidden state at [RET] -> retrieval space                       section 3.2
    fusion                           of the r states there, if it has parameters; see fromage.models.fusion
    image head      W_i  (q x m)     image features -> retrieval space; CLIP's with space 'clip'     section 3.2
    logit_scale                      log of the inverse temperature, starts at ln(1 / 0.07)

The released code, and so this one, adds a bias to each of the three maps, which the paper's formulas leave out.

The paper has r = 1. With r > 1, as in its successors GILL and MCL, [RET] is r tokens in a row, [RET], [RET2] ... [RETr], at
the end of every caption and query. Sequential ones see their predecessors (GILL); stacked ones share one position, and each
sees what stands before and itself alone (MCL). Only PromptTokenizer knows their ids (`ret_ids`).

Source: Koh, Salakhutdinov, Fried, "Grounding Language Models to Images for Multimodal Inputs and Outputs", ICML 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromage.checkpoints.format import FROMAGE, Saved, differences, dtype_name, parameter_shapes
from fromage.checks import check_whole
from fromage.config import CAPTION_LENGTH, FromageConfig
from fromage.data.padding import token_mask
from fromage.data.tokenizer import ret_tokens
from fromage.errors import UserError
from fromage.models.base import VisualPrefix, digest
from fromage.models.fusion import make_fusion
from fromage.models.language_model import LanguageModel, load_lm
from fromage.models.pretrained import Pretrained
from fromage.models.prompts import RET, ImageInput, Prompt, Starts, batches_by_length, embed_prompts, listed, parts_of
from fromage.models.vision.base import VisionTower
from fromage.models.vision.registry import load_vision

OTHER = "{source}: of another architecture ({differs}); give the lm, vision, k, q, r and ret_fusion it was trained with"


class Fromage(Pretrained):
    """The model. Trained parameters are float32 whatever the dtype of the towers.

    Attributes:
        k, q, r: as of the configuration.
    """

    kind = FROMAGE
    config_class = FromageConfig
    config: FromageConfig

    def __init__(self, lm: LanguageModel, vision: VisionTower, config: FromageConfig) -> None:
        """Build from two loaded towers; those that config names are not loaded.

        With space 'clip' images are compared where CLIP has them: the image head is CLIP's own projection, frozen, and q is
        its width; W_t maps text there. Raises UserError for a tower without text tower, or another q.

        With pooling 'last' the model never answers with images, and "at [RET]" below means at the last token before it.
        Raises UserError where an empty text would have no token.

        Many language models, LLaMA and its like, make the first place of a sequence an attention sink, whose content later
        tokens hardly see ("Efficient Streaming Language Models with Attention Sinks", Xiao et al., ICLR 2024). With start
        'first' that place is the start token's, and not an image's. Raises UserError without a start token.
        """
        super().__init__(lm, vision, config.k)
        self.config, self.q, self.r = config, config.q, len(lm.tokenizer.ret_ids)
        self.start_first = config.start == "first"
        if self.r != config.r:
            raise UserError(f"{lm.name}: its tokenizer has {self.r} [RET] tokens, and r is {config.r}; give that as r")
        if not lm.tokenizer.start():
            if self.pools_last_word:
                told = "its texts have no start token, so an empty one has no last word; use pooling 'ret'"
                raise UserError(f"{lm.name}: {told}")
            if self.start_first:
                raise UserError(f"{lm.name}: its texts have no start token; use start 'after_images'")
        self.ret_offsets = [0 if config.stacked else i for i in range(self.r)]  # positions of [RET] after a text's end
        self.visual_prefix = VisualPrefix(vision.width, lm.width, self.k)  # W_c: (B, m) -> (B, k, d)
        self.text_head = nn.Linear(lm.width, self.q)  # W_t: (B, d) -> (B, q)
        self.image_head = nn.Linear(vision.width, self.q)  # W_i: (B, m) -> (B, q)
        if config.space == "clip":
            take_projection(self.image_head, vision)
        self.ret = lm.added  # e_RET (r, d)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.fusion = make_fusion(config.ret_fusion, self.q)  # (B, r, q) -> (B, q)

    @classmethod
    def load_towers(cls, config: FromageConfig) -> tuple[LanguageModel, VisionTower]:
        """The two frozen towers of a configuration; the tokenizer has its [RET] tokens."""
        dtype = dtype_name(config.dtype)
        vision = load_vision(config.vision, config.vision_weights, dtype, config.random_weights)
        return load_lm(config.lm, dtype, config.random_weights, config.quantize, ret_tokens(config.r)), vision

    @property
    def pools_last_word(self) -> bool:
        """Whether a text's embedding is read at its last word instead of at [RET]."""
        return self.config.pooling == "last"

    def caption(
        self, images: str | ImageInput | Sequence[str | ImageInput], max_new_tokens: int = CAPTION_LENGTH
    ) -> list[str]:
        """Greedy captions of images, as fromage.caption gives them."""
        from fromage.generation.generate import caption  # stands above this module: an exception named in setup.cfg

        return caption(self, images, max_new_tokens)

    def embed_images(self, features: Tensor) -> Tensor:
        """(B, m) image features -> (B, q) unit rows of the retrieval space: W_i v(x) + b, normalised (section 3.2)."""
        return F.normalize(self.image_head(features.float()), dim=-1)  # (B, m) -> (B, q)

    def embed_ret(self, hidden: Tensor) -> Tensor:
        """(B, r, d) hidden states at [RET] -> (B, q) unit rows: W_t h + b of each, fused, normalised (section 3.2)."""
        return F.normalize(self.fusion(self.text_head(hidden.float())), dim=-1)  # (B, r, d) -> (B, r, q) -> (B, q)

    def positions(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """(B, T) ids, of which the bool mask shows the tokens -> (B, T) positions where [RET] is stacked; None elsewhere.

        The r tokens of a stacked [RET] share one position, and the token after them has the next: it sees all of them.
        """
        if not self.config.stacked:
            return None
        follows = torch.isin(ids, torch.tensor(self.tokenizer.ret_ids[1:], device=ids.device))  # (B, T)
        return ((mask & ~follows).cumsum(1) - 1).clamp(min=0)  # (B, T)

    def text_states(self, hidden: Tensor, ends: Tensor) -> Tensor:
        """(B, T, d) hidden states of texts -> (B, r, d), those that embed them: at [RET], or at the last word before it.

        ends: (B,) places of the first [RET], which are the numbers of tokens in front of it. Of packed texts hidden is
        (N, d), and ends are places among the N.
        """
        if hidden.ndim == 3:  # put end to end
            ends = ends + hidden.shape[1] * torch.arange(len(ends), device=ends.device)  # (B,)
            hidden = hidden.flatten(0, 1)  # (B, T, d) -> (B T, d)
        first = ends - 1 if self.pools_last_word else ends  # (B,)
        at = first.unsqueeze(1) + torch.arange(self.r, device=ends.device)  # (B, r)
        return hidden.index_select(0, at.flatten()).unflatten(0, at.shape)  # (B r, d) -> (B, r, d)

    def hidden_of_texts(self, ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Run right-padded texts (B, T) that end in [RET]: hidden states (B, T, d), and those at [RET] (B, r, d)."""
        mask = token_mask(lengths, ids.shape[1], ids.device)  # (B, T)
        hidden = self.lm(self.embed(ids), mask, self.positions(ids, mask))  # (B, T, d)
        return hidden, self.text_states(hidden, mask.sum(1) - self.r)  # (B, T, d) -> (B, r, d)

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[Prompt], batch_size: int = 128) -> Tensor:
        """Texts, or prompts of text and images -> (B, q) unit rows: [RET] is appended to each, and W_t h + b taken there.

        White space at a prompt's end is stripped, as in training. batch_size: prompts encoded at a time, those of like
        length together. Raises UserError for prompts that are too long and images that cannot be opened.
        """
        check_whole("batch_size", batch_size, 1)
        prompts = listed(prompts)
        rows = torch.empty(len(prompts), self.q, device=self.device)  # (B, q)
        for at in batches_by_length(prompts, batch_size):
            batch = embed_prompts(self, [[*parts_of(prompts[i]), RET] for i in at], starts=Starts.ONCE)
            hidden = self.lm(batch.embeds, batch.mask, self.positions(batch.ids, batch.mask))  # (b, T, d)
            ends = torch.full((len(at),), hidden.shape[1] - self.r, device=self.device)  # (b,), since padding is on the left
            rows[at] = self.embed_ret(self.text_states(hidden, ends))  # (b, T, d) -> (b, r, d) -> (b, q)
        return rows

    @classmethod
    def check_sizes(cls, config: FromageConfig, saved: Saved) -> None:
        """Raise UserError unless saved parameters are of the k, q and r on record."""
        want = parameter_shapes(saved.tensors, config.k, config.q, config.r)
        if differs := differences({name: value for name, value in saved.tensors.items() if name in want}, want):
            raise UserError(OTHER.format(source=saved.source, differs=differs))

    def load_parameters(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Load trained parameters. Raises UserError unless they are this model's, by name and shape."""
        self.check_trained(tensors, source)
        self.load_state_dict(dict(tensors), strict=False)

    def check_trained(self, tensors: Mapping[str, Tensor], source: str = "checkpoint") -> None:
        """Raise UserError unless these are the model's trained parameters, by name and shape."""
        differs = differences(tensors, {name: tuple(p.shape) for name, p in self.trained().items()})
        if not self.ret.tied and "ret.output_rows" not in tensors:
            differs += f"; {self.lm.name} does not tie its head to its embedding, so [RET] needs a row there too"
        if differs:
            raise UserError(OTHER.format(source=source, differs=differs))

    def fingerprint(self, trained: Mapping[str, Tensor] | None = None) -> str:
        """16 hex digits that change with any trained parameter and the towers; an index stores them.

        Of the vision tower its weights count, of the language model its name alone: whoever replaces the weights of a
        name must build indexes again.

        trained: values to use in place of the model's own, such as the values after rounding to a file's dtype.
        """
        built = f"{self.lm.name}|{self.vision.fingerprint()}|{self.k}|{self.q}" + "last" * self.pools_last_word
        built += "".join(f"|{name} {value}" for name, value in self.config.unlike_paper.items())
        return digest(built, trained or self.trained())


@torch.no_grad()
def take_projection(head: nn.Linear, vision: VisionTower) -> None:
    """Make an image head (m -> q) CLIP's own projection, with a bias of 0 where that has none, and freeze it.

    Raises UserError for a tower without text tower, a projection of another width, and one that is more than a linear map.
    """
    project = vision.projection
    if project is None:
        told = "has no text tower, so no space that images and texts share"
        raise UserError(f"vision tower {vision.name}: {told}; choose a CLIP or SigLIP, or space 'learned'")
    device = next(project.parameters(), head.weight).device
    bias = project(torch.zeros(1, head.in_features, device=device))  # (1, e)
    if bias.shape[1] != head.out_features:
        raise UserError(f"q {head.out_features}: CLIP's joint space of {vision.name} has {bias.shape[1]}; give that as q")
    weight = (project(torch.eye(head.in_features, device=device)) - bias).T  # (e, m)
    some = torch.linspace(-1, 1, head.in_features, device=device).unsqueeze(0)  # (1, m)
    if not torch.allclose(project(some), some @ weight.T + bias, rtol=1e-3, atol=1e-3):
        raise UserError(f"vision tower {vision.name}: its projection is no linear map; choose space 'learned'")
    head.weight.copy_(weight)
    head.bias.copy_(bias[0])
    head.requires_grad_(False)


def load_model(path: str | Path, device: str = "cpu", **options: Any) -> Fromage:
    """Fromage.from_pretrained as a function."""
    return Fromage.from_pretrained(path, device, **options)
