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

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromage.backbones import LanguageModel, VisionTower, load_lm, load_vision

TOWERS = ("lm.", "vision.")


class Fromage(nn.Module):
    """The model. Trained parameters are float32 whatever the towers hold; each is applied in the tower's dtype."""

    def __init__(self, lm: LanguageModel, vision: VisionTower, k: int = 1, q: int = 256) -> None:
        """k: input embeddings per picture. q: width of the retrieval space."""
        super().__init__()
        self.lm, self.vision, self.k, self.q = lm, vision, k, q
        self.visual_prefix = nn.Linear(vision.width, k * lm.width)  # W_c
        self.text_head = nn.Linear(lm.width, q)  # W_t
        self.image_head = nn.Linear(vision.width, q)  # W_i
        self.ret = lm.added  # e_RET
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.tokenizer = lm.tokenizer

    @classmethod
    def load(
        cls,
        lm: str = "toy",
        vision: str = "toy",
        vision_weights: str | None = None,
        k: int = 1,
        q: int = 256,
        dtype: str = "float32",
        random_weights: bool = False,
        seed: int = 0,
    ) -> Fromage:
        """Build from names, the trained parameters fresh; see load_lm and load_vision for what a name may be.

        The same seed gives the same trained parameters, and the same towers where these are random.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tower = load_vision(vision, None if random_weights else vision_weights, dtype)
            return cls(load_lm(lm, dtype, random_weights), tower, k, q)

    @property
    def device(self) -> torch.device:
        """Where the trained parameters are."""
        return self.logit_scale.device

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name; the towers have none."""
        return {name: p for name, p in self.named_parameters() if not name.startswith(TOWERS)}

    def prefix(self, features: Tensor) -> Tensor:
        """(B, m) image features -> (B, k, d) input embeddings: W_c v(x) + b."""
        return self.visual_prefix(features.float()).unflatten(-1, (self.k, self.lm.width))  # (B, k d) -> (B, k, d)

    def embed(self, ids: Tensor, prefix: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T, d) input embeddings; the places of <|image|> are filled from prefix (N, k, d), in order."""
        embeds = self.lm.embed(ids)  # (B, T, d)
        if prefix is None:
            return embeds
        places = (ids == self.tokenizer.image_id).unsqueeze(-1)  # (B, T, 1)
        return embeds.masked_scatter(places, prefix.to(embeds.dtype))

    def embed_images(self, features: Tensor) -> Tensor:
        """(B, m) image features -> (B, q) unit rows of the retrieval space: W_i v(x) + b, normalised."""
        return F.normalize(self.image_head(features.float()), dim=-1)

    def embed_ret(self, hidden: Tensor) -> Tensor:
        """(B, d) hidden states at [RET] -> (B, q) unit rows: W_t h + b, normalised."""
        return F.normalize(self.text_head(hidden.float()), dim=-1)

    def hidden_at_ret(self, ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Run right-padded texts that end in [RET]: hidden states (B, T, d) and those at [RET] (B, d)."""
        ends = torch.tensor(lengths, device=ids.device).unsqueeze(1)  # (B, 1)
        hidden = self.lm(self.embed(ids), torch.arange(ids.shape[1], device=ids.device) < ends)  # (B, T, d)
        return hidden, hidden.gather(1, (ends - 1).unsqueeze(2).expand(-1, -1, hidden.shape[2])).squeeze(1)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str], max_tokens: int = 2048, batch_size: int = 128) -> Tensor:
        """Texts -> (B, q) unit rows: each with [RET] behind it, run through the language model."""
        rows = [self.tokenizer.caption(text, max_tokens) for text in texts]
        out = []
        for start in range(0, len(rows), batch_size):
            ids, lengths = pad(rows[start : start + batch_size], self.tokenizer.pad_id)
            out.append(self.embed_ret(self.hidden_at_ret(ids.to(self.device), lengths)[1]))
        return torch.cat(out) if out else torch.empty(0, self.q, device=self.device)

    def fingerprint(self) -> str:
        """16 hex digits that change with any trained parameter and with the towers: what an index belongs to."""
        digest = hashlib.sha256(f"{self.lm.name}|{self.vision.fingerprint()}|{self.k}|{self.q}".encode())
        for name, p in sorted(self.trained().items()):
            digest.update(name.encode() + p.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, list[int]]:
    """Lists of ids -> (B, T) right-padded to the longest, and their lengths."""
    lengths = [len(row) for row in rows]
    ids = torch.full((len(rows), max(lengths)), pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths
