"""FROMAGe: a frozen language model and a frozen image tower with 5.5 million trained parameters between them.

Shapes, here and everywhere: B batch, T text tokens, k places of a picture in a sequence, m width of the image features,
d width of the language model, q width of the shared retrieval space, V tokens of the frozen vocabulary.

    visual prefix   W_c  (d k x m)   a picture becomes k input embeddings                     section 3.1
    [RET]           e    (d)         asks for a picture; lives in fromage.added_tokens         section 3.2
    text head       W_t  (q x d)     hidden state at [RET] -> retrieval space                  section 3.2
    image head      W_i  (q x m)     image features -> retrieval space                         section 3.2
    logit_scale                      log of the inverse temperature, starts at ln(1 / 0.07)

Source: Koh, Salakhutdinov, Fried, "Grounding Language Models to Images for Multimodal Inputs and Outputs", ICML 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from fromage.backbones import LanguageModel, Quantized, VisionTower, load_lm, load_vision
from fromage.errors import UserError, first_line
from fromage.picture_reader import PictureReader, digest

Pooling = Literal["ret", "last"]  # where a text is read for retrieval: at [RET], or at its last word (an ablation)


class Fromage(PictureReader, ModelHubMixin):
    """The model. Trained parameters are float32 whatever the towers hold; each is applied in the tower's dtype.

    Attributes:
        settings: the arguments of load it was built with; empty if it was built from modules.
        stored_dtype: what save_pretrained and push_to_hub round trained parameters to; after loading, what the file holds.
    """

    def __init__(self, lm: LanguageModel, vision: VisionTower, k: int = 1, q: int = 256, pooling: Pooling = "ret") -> None:
        """k: input embeddings per picture. q: width of the retrieval space.

        pooling: where texts are read for retrieval. With 'last' the model never answers with pictures, and 'at [RET]' in
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
        force_download and local_files_only of the hub. Raises UserError as fromage.checkpoint.load_model does.
        """
        from fromage.checkpoint import load_model

        return load_model(name, device, dtype=dtype, **options)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, dtype: str | None = None, config: None = None, model_card_kwargs: None = None
    ) -> None:
        """Write the trained parameters as a folder, see fromage.model_folder; push_to_hub uploads what this writes.

        dtype: bfloat16 (11 MB at full size), float16, or float32 (22 MB), which keeps every bit; by default stored_dtype.
        config and model_card_kwargs are there for push_to_hub: the folder brings its own.
        """
        from fromage.checkpoint import describe
        from fromage.model_folder import write_folder

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
    def embed_text(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        """Texts -> (B, q) unit rows, as fromage.prompts.embed_for_retrieval. Raises UserError for one that is too long."""
        from fromage.prompts import embed_for_retrieval

        return embed_for_retrieval(self, texts, batch_size)

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
