"""FROMAGe: a frozen language model and a frozen image tower with 5.5 million trained parameters between them.

Shapes, here and everywhere: B batch, T text tokens, k places of an image in a sequence, m width of the image features,
d width of the language model, q width of the shared retrieval space, V tokens of the frozen vocabulary.

    visual prefix   W_c  (d k x m)   an image becomes k input embeddings                            section 3.1
    [RET]           e    (d)         asks for an image; lives in fromage.models.special_tokens      section 3.2
    text head       W_t  (q x d)     hidden state at [RET] -> retrieval space                       section 3.2
    image head      W_i  (q x m)     image features -> retrieval space                              section 3.2
    logit_scale                      log of the inverse temperature, starts at ln(1 / 0.07)

Source: Koh, Salakhutdinov, Fried, "Grounding Language Models to Images for Multimodal Inputs and Outputs", ICML 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from fromage.checkpoints.format import DTYPES, Saved, dtype_name, write_folder
from fromage.checkpoints.load import HUB_OPTIONS, read_saved
from fromage.checks import check_whole
from fromage.errors import UserError, first_line
from fromage.models.base import VisualPrefixLM, digest
from fromage.models.language_model import LanguageModel, Quantized, load_lm
from fromage.models.pretrained import build, describe
from fromage.models.prompts import RET, Prompt, embed_prompts, parts_of
from fromage.models.vision.base import VisionTower
from fromage.models.vision.registry import load_vision

Pooling = Literal["ret", "last"]  # where a text is read for retrieval: at [RET], or at its last word (an ablation)


class Fromage(VisualPrefixLM, ModelHubMixin):
    """The model. Trained parameters are float32 whatever the towers hold; each is applied in the tower's dtype.

    Attributes:
        settings: the arguments of load it was built with; empty if it was built from modules.
        stored_dtype: what save_pretrained and push_to_hub round trained parameters to; after loading, what the file holds.
    """

    def __init__(self, lm: LanguageModel, vision: VisionTower, k: int = 1, q: int = 256, pooling: Pooling = "ret") -> None:
        """k: input embeddings per image. q: width of the retrieval space.

        pooling: where texts are read for retrieval. With 'last' the model never answers with images, and 'at [RET]' in
        what follows means at the last token before it. Raises UserError where a text may then have no token at all.
        """
        super().__init__(lm, vision, k)
        if pooling == "last" and not lm.tokenizer.start():
            raise UserError(f"{lm.name}: its texts have no start token, so an empty one has no last word; use pooling 'ret'")
        self.q, self.pooling = q, pooling
        self.visual_prefix = nn.Linear(vision.width, k * lm.width)  # W_c
        self.text_head = nn.Linear(lm.width, q)  # W_t
        self.image_head = nn.Linear(vision.width, q)  # W_i
        self.ret = lm.added  # e_RET
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.settings: dict[str, Any] = {}
        self.stored_dtype = "bfloat16"

    @classmethod
    def load(
        cls,
        lm: str = "toy",
        vision: str = "toy",
        vision_weights: str | None = None,
        k: int = 1,
        q: int = 256,
        pooling: Pooling = "ret",
        dtype: str = "float32",
        random_weights: bool = False,
        quantize: Quantized | None = None,
        seed: int = 0,
    ) -> Fromage:
        """Build from names, the trained parameters fresh; see load_lm and load_vision for what a name may be.

        The same seed gives the same trained parameters, and the same towers where these are random.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tower = load_vision(vision, vision_weights, dtype, random_weights)
            model = cls(load_lm(lm, dtype, random_weights, quantize), tower, k, q, pooling)
        model.settings = {"lm": lm, "vision": vision, "vision_weights": vision_weights, "k": k, "q": q, "dtype": dtype}
        model.settings |= {"pooling": pooling, "random_weights": random_weights}
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, device: str = "cpu", dtype: str | torch.dtype | None = None, **options: Any
    ) -> Fromage:
        """The model of a folder, of a name on the Hugging Face hub or of a Lightning checkpoint, in eval mode.

        dtype: of the towers, in place of the one they were trained under. options: further arguments of load to replace
        (quantize; lm, vision and vision_weights where the towers lie elsewhere), and revision, token, cache_dir,
        force_download and local_files_only of the hub. Raises UserError for what is missing or damaged, and
        for a device that is not there.
        """
        hub = {key: options.pop(key) for key in HUB_OPTIONS & options.keys()}
        return build(cls, read_saved(name, **hub), device, dtype=dtype, **options)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, dtype: str | None = None, config: None = None, model_card_kwargs: None = None
    ) -> None:
        """Write the trained parameters as a folder, see fromage.checkpoints.format; push_to_hub uploads what this writes.

        dtype: bfloat16 (11 MB at full size), float16, or float32 (22 MB), which keeps every bit; by default stored_dtype.
        config and model_card_kwargs are there for push_to_hub: the folder brings its own.
        """
        write_folder(describe(self, dtype), save_directory)

    def prefix(self, features: Tensor) -> Tensor:
        """(B, m) image features -> (B, k, d) input embeddings: W_c v(x) + b."""
        return self.visual_prefix(features.float()).unflatten(-1, (self.k, self.lm.width))  # (B, k d) -> (B, k, d)

    def embed_images(self, features: Tensor) -> Tensor:
        """(B, m) image features -> (B, q) unit rows of the retrieval space: W_i v(x) + b, normalised."""
        return F.normalize(self.image_head(features.float()), dim=-1)

    def embed_ret(self, hidden: Tensor) -> Tensor:
        """(B, d) hidden states at [RET] -> (B, q) unit rows: W_t h + b, normalised."""
        return F.normalize(self.text_head(hidden.float()), dim=-1)

    def hidden_at_ret(self, ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Run right-padded texts that end in [RET]: hidden states (B, T, d) and those at [RET] (B, d), see pooling."""
        ends = torch.tensor(lengths, device=ids.device).unsqueeze(1)  # (B, 1)
        hidden = self.lm(self.embed(ids), torch.arange(ids.shape[1], device=ids.device) < ends)  # (B, T, d)
        at = ends - (1 if self.pooling == "ret" else 2)  # (B, 1)
        return hidden, hidden.gather(1, at.unsqueeze(2).expand(-1, -1, hidden.shape[2])).squeeze(1)

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[Prompt], batch_size: int = 128) -> Tensor:
        """Texts, or prompts of text and images -> (B, q) unit rows: each with [RET] behind it, W_t h + b at its end.

        Raises UserError for prompts that are too long, and for images that cannot be opened.
        """
        check_whole("batch_size", batch_size, 1)
        behind = [RET] if self.pooling == "ret" else []
        out = [torch.empty(0, self.q, device=self.device)]
        for start in range(0, len(prompts), batch_size):
            batch = embed_prompts(self, [[*parts_of(prompt), *behind] for prompt in prompts[start : start + batch_size]])
            out.append(self.embed_ret(self.lm(batch.embeds, batch.mask)[:, -1]))  # (b, T, d) -> (b, q)
        return torch.cat(out)

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Upload what save_pretrained writes to the Hugging Face hub; options as of ModelHubMixin. Returns an address."""
        try:
            return super().push_to_hub(repo_id, **hub)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{repo_id}: not uploaded ({first_line(error)}); name a repository of yours, hf auth login"
            ) from error

    def fingerprint(self, trained: Mapping[str, Tensor] | None = None) -> str:
        """16 hex digits that change with any trained parameter and with the towers: what an index belongs to.

        trained: values to count in place of the model's own, such as these rounded to what a file holds.
        """
        built = f"{self.lm.name}|{self.vision.fingerprint()}|{self.k}|{self.q}"
        return digest(built + ("" if self.pooling == "ret" else self.pooling), trained or self.trained())


def load_model(path: str | Path, device: str = "cpu", **options: Any) -> Fromage:
    """Fromage.from_pretrained as a function."""
    return Fromage.from_pretrained(path, device, **options)


def for_disk(saved: Saved, dtype: str | None = None) -> Saved:
    """Saved parameters complete and rounded to dtype, by default as they are.

    What a Lightning checkpoint leaves open, ids and fingerprint, its towers are loaded for; its default is bfloat16.
    """
    if not saved.added_tokens:
        return replace(describe(build(Fromage, saved), dtype), source=saved.source)
    if dtype is None:
        return saved
    tensors = {name: value.to(DTYPES[dtype_name(dtype)]) for name, value in saved.tensors.items()}
    exact = all(torch.equal(tensors[name].float(), value.float()) for name, value in saved.tensors.items())
    return replace(saved, tensors=tensors, fingerprint=saved.fingerprint if exact else None)
