"""FROMAGe: a frozen language model and a frozen vision tower with 5.5 million trained parameters between them.

The trained parameters (the legend of shapes is in fromage.models):

    visual prefix   W_c  (d k x m)   image features -> k input embeddings                           section 3.1
    [RET]           e    (d)         asks for an image; see fromage.models.special_tokens           section 3.2
    text head       W_t  (q x d)     hidden state at [RET] -> retrieval space                       section 3.2
    image head      W_i  (q x m)     image features -> retrieval space                              section 3.2
    logit_scale                      log of the inverse temperature, starts at ln(1 / 0.07)

The released code, and so this one, adds a bias to each of the three maps, which the paper's formulas leave out.

Source: Koh, Salakhutdinov, Fried, "Grounding Language Models to Images for Multimodal Inputs and Outputs", ICML 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

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
from fromage.models.prompts import RET, ImageInput, Prompt, Starts, embed_prompts, listed, parts_of
from fromage.models.vision.base import VisionTower
from fromage.models.vision.registry import load_vision

Pooling = Literal["ret", "last"]  # which hidden state embeds a text: the one at [RET], or at its last word (an ablation)


class Fromage(VisualPrefixLM, ModelHubMixin):
    """The model. Trained parameters are float32 whatever the dtype of the towers.

    Attributes:
        settings: the arguments of `load`; empty if the model was built from modules.
        input_prompt: text in front of every caption that is generated, not part of it.
        generation: content of generation.json, how to talk with the model (fromage.generation.preset); None: nothing said.
        stored_dtype: dtype to which save_pretrained and push_to_hub round; after loading, the dtype of the file.
    """

    def __init__(self, lm: LanguageModel, vision: VisionTower, k: int = 1, q: int = 256, pooling: Pooling = "ret") -> None:
        """k: input embeddings per image. q: width of the retrieval space.

        pooling: which hidden state embeds a text. With 'last' the model never answers with images, and "at [RET]" below
        means at the last token before it. Raises UserError where 'last' is impossible: an empty text would have no token.
        """
        super().__init__(lm, vision, k)
        if pooling not in get_args(Pooling):  # of a file, say
            raise UserError(f"pooling {pooling}: must be {' or '.join(get_args(Pooling))}")
        if pooling == "last" and not lm.tokenizer.start():
            raise UserError(f"{lm.name}: its texts have no start token, so an empty one has no last word; use pooling 'ret'")
        self.q, self.pooling = q, pooling
        self.visual_prefix = nn.Linear(vision.width, k * lm.width)  # W_c: (B, m) -> (B, k d)
        self.text_head = nn.Linear(lm.width, q)  # W_t: (B, d) -> (B, q)
        self.image_head = nn.Linear(vision.width, q)  # W_i: (B, m) -> (B, q)
        self.ret = lm.added  # e_RET (1, d)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.settings: dict[str, Any] = {}
        self.input_prompt = ""
        self.stored_dtype = "bfloat16"
        self.generation: dict[str, Any] | None = None

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
        input_prompt: str = "",
    ) -> Fromage:
        """Build from names, with newly initialised trained parameters; load_lm and load_vision say what a name may be.

        The same seed gives the same trained parameters, and the same towers where they have random weights. input_prompt:
        text that captions are generated behind, such as the released model's "A picture of".
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tower = load_vision(vision, vision_weights, dtype, random_weights)
            model = cls(load_lm(lm, dtype, random_weights, quantize), tower, k, q, pooling)
        model.settings = {"lm": lm, "vision": vision, "vision_weights": vision_weights, "k": k, "q": q, "dtype": dtype}
        model.settings |= {"pooling": pooling, "random_weights": random_weights, "input_prompt": input_prompt}
        model.input_prompt = input_prompt
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, device: str = "cpu", dtype: str | torch.dtype | None = None, **options: Any
    ) -> Fromage:
        """The model of a folder, of a name on the Hugging Face hub or of a Lightning checkpoint, in eval mode.

        dtype: dtype of the towers (overrides the one of training). options: further arguments of `load` to override
        (quantize; lm, vision and vision_weights if the towers have moved), and revision, token, cache_dir, force_download
        and local_files_only of the hub. Raises UserError for missing or damaged files and for an unknown device.
        """
        hub = {key: options.pop(key) for key in HUB_OPTIONS & options.keys()}
        return build(cls, read_saved(name, **hub), device, dtype=dtype, **options)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, dtype: str | None = None, config: None = None, model_card_kwargs: None = None
    ) -> None:
        """Write the trained parameters as a folder, see fromage.checkpoints.format; push_to_hub uploads what this writes.

        dtype: bfloat16 (11 MB at full size), float16, or float32 (22 MB, lossless); by default stored_dtype.
        config and model_card_kwargs are ignored; ModelHubMixin passes them.
        """
        write_folder(describe(self, dtype), save_directory, overwrite=True)

    def caption(self, images: str | ImageInput | Sequence[str | ImageInput], max_new_tokens: int = 32) -> list[str]:
        """Greedy captions of images, as fromage.caption gives them."""
        import fromage

        return fromage.caption(self, images, max_new_tokens)

    def prefix(self, features: Tensor) -> Tensor:
        """(B, m) image features -> (B, k, d) input embeddings: W_c v(x) + b (section 3.1)."""
        return self.visual_prefix(features.float()).unflatten(-1, (self.k, self.lm.width))  # (B, k d) -> (B, k, d)

    def embed_images(self, features: Tensor) -> Tensor:
        """(B, m) image features -> (B, q) unit rows of the retrieval space: W_i v(x) + b, normalised (section 3.2)."""
        return F.normalize(self.image_head(features.float()), dim=-1)  # (B, m) -> (B, q)

    def embed_ret(self, hidden: Tensor) -> Tensor:
        """(B, d) hidden states at [RET] -> (B, q) unit rows: W_t h + b, normalised (section 3.2)."""
        return F.normalize(self.text_head(hidden.float()), dim=-1)  # (B, d) -> (B, q)

    def hidden_at_ret(self, ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Run right-padded texts (B, T) that end in [RET]: hidden states (B, T, d), and the one at [RET] (B, d)."""
        ends = torch.tensor(lengths, device=ids.device).unsqueeze(1)  # (B, 1)
        hidden = self.lm(self.embed(ids), torch.arange(ids.shape[1], device=ids.device) < ends)  # (B, T, d)
        at = ends - (1 if self.pooling == "ret" else 2)  # (B, 1)
        return hidden, hidden.gather(1, at.unsqueeze(2).expand(-1, -1, hidden.shape[2])).squeeze(1)  # (B, 1, d) -> (B, d)

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[Prompt], batch_size: int = 128, starts: Starts = Starts.ONCE) -> Tensor:
        """Texts, or prompts of text and images -> (B, q) unit rows: [RET] is appended to each, and W_t h + b taken there.

        batch_size: prompts encoded at a time. starts: where </s> stands. Raises UserError for prompts that are too long and
        images that cannot be opened.
        """
        check_whole("batch_size", batch_size, 1)
        prompts = listed(prompts)
        suffix = [RET] if self.pooling == "ret" else []
        out = [torch.empty(0, self.q, device=self.device)]
        for start in range(0, len(prompts), batch_size):
            some = [[*parts_of(prompt), *suffix] for prompt in prompts[start : start + batch_size]]
            batch = embed_prompts(self, some, starts=starts)
            out.append(self.embed_ret(self.lm(batch.embeds, batch.mask)[:, -1]))  # (b, T, d) -> (b, q)
        return torch.cat(out)  # (B, q)

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Upload what save_pretrained writes to the Hugging Face hub; options of ModelHubMixin. Returns the address."""
        try:
            return super().push_to_hub(repo_id, **hub)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{repo_id}: not uploaded ({first_line(error)}); name a repository of your own, and log in by hf auth login"
            ) from error

    def fingerprint(self, trained: Mapping[str, Tensor] | None = None) -> str:
        """16 hex digits that change with any trained parameter and with the towers; an index stores them.

        trained: values to use in place of the model's own, such as the values after rounding to a file's dtype.
        """
        built = f"{self.lm.name}|{self.vision.fingerprint()}|{self.k}|{self.q}"
        return digest(built + ("" if self.pooling == "ret" else self.pooling), trained or self.trained())


def load_model(path: str | Path, device: str = "cpu", **options: Any) -> Fromage:
    """Fromage.from_pretrained as a function."""
    return Fromage.from_pretrained(path, device, **options)


def for_disk(saved: Saved, dtype: str | None = None) -> Saved:
    """Saved parameters with ids and fingerprint, rounded to dtype (None: unchanged).

    A Lightning checkpoint holds neither ids nor fingerprint: its towers are loaded to get them, and None means bfloat16.
    """
    if not saved.added_tokens:
        return replace(describe(build(Fromage, saved), dtype), source=saved.source)
    if dtype is None:
        return saved
    tensors = {name: value.to(DTYPES[dtype_name(dtype)]) for name, value in saved.tensors.items()}
    exact = all(torch.equal(tensors[name].float(), value.float()) for name, value in saved.tensors.items())
    return replace(saved, tensors=tensors, fingerprint=saved.fingerprint if exact else None)
