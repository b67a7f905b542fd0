"""The [RET] rows: trained token embeddings beside a frozen vocabulary (section 3.2; Octopus' index tokens use it too).

The released code resizes the embedding matrix, makes all of it trainable and zeroes every gradient row but one. Here the
matrix stays frozen and [RET] has a parameter of its own: the same model, with V x d fewer gradients and Adam moments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fromage.models.frozen import hold


class AddedTokens(nn.Module):
    """Rows for n new tokens: e in R^(n x d), at the input and, where the LM ties its embeddings, also at the output.

    An LM that does not tie its embeddings (LLaMA, Mistral, Qwen) gets a second set at the output, or it could never
    learn to emit the tokens. The last f of them, the followers, are never chosen (of several [RET] tokens all but the
    first, which brings the others with it): the head has no row for them.
    """

    def __init__(
        self, embedding: nn.Embedding, head: nn.Linear, ids: list[int], vocab_size: int, tied: bool, followers: int = 0
    ) -> None:
        """ids: consecutive ids of the new tokens, at least vocab_size; the list may be empty. followers: f.

        Ids between vocab_size and the first of them (<|image|>) have no row and are never emitted.
        """
        super().__init__()
        self.num_followers = followers
        self.first, self.vocab_size, self.tied = ids[0] if ids else vocab_size, vocab_size, tied
        if ids != list(range(self.first, self.first + len(ids))) or self.first < vocab_size:
            raise ValueError(f"added ids must be consecutive and at least {vocab_size}, not {ids}")
        frozen = embedding.weight[:vocab_size].detach()
        norm = _mean_norm(frozen)
        self.register_buffer("mean_norm", norm, persistent=False)
        self.input = nn.Parameter(_rows(len(ids), frozen.shape[1], norm))  # (n, d)
        if not tied:
            scale = _mean_norm(head.weight[:vocab_size].detach())
            self.output_rows = nn.Parameter(_rows(len(ids) - followers, head.weight.shape[1], scale))  # (n - f, d)

    @property
    def output(self) -> Tensor:
        """The rows of the output head, (n - f, d): the input rows where the LM ties them."""
        return self.input[: len(self.input) - self.num_followers] if self.tied else self.output_rows

    @torch.no_grad()
    def rescale_(self) -> None:
        """Rescale each input row to the mean norm of the frozen embeddings.

        The released code does this after every step; the paper does not mention it.
        """
        self.input.mul_(self.mean_norm / self.input.norm(dim=1, keepdim=True).clamp_min(1e-12))  # (n, d) * (n, 1)


def _mean_norm(rows: Tensor) -> Tensor:
    """Of (N, d) rows the mean length, a scalar in float32."""
    return torch.cat([chunk.float().norm(dim=1) for chunk in rows.split(4096)]).mean()


def _rows(n: int, d: int, norm: Tensor) -> Tensor:
    rows = torch.randn(n, d)  # (n, d)
    return rows / rows.norm(dim=1, keepdim=True) * norm.cpu()


class ExtendedEmbedding(nn.Module):
    """The input embedding of an LM plus the added rows. It replaces the LM's own, so the LM's code uses it unchanged."""

    added: AddedTokens

    def __init__(self, frozen: nn.Embedding, added: AddedTokens) -> None:
        super().__init__()
        self.frozen = frozen
        hold(self, "added", added)  # the rows belong to the model, not to the LM

    @property
    def weight(self) -> Tensor:
        """The frozen matrix; Hugging Face asks for its dtype and device."""
        return self.frozen.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, d)."""
        added = self.added
        frozen = self.frozen(ids.clamp(max=added.vocab_size - 1))  # (B, T, d)
        if not len(added.input):
            return frozen
        number = (ids - added.first).clamp(0, len(added.input) - 1)  # (B, T); an index would sort them in the backward
        rows = added.input.index_select(0, number.flatten()) * getattr(self.frozen, "embed_scale", 1.0)  # as Gemma 3 scales
        return torch.where((ids >= added.first).unsqueeze(-1), rows.view_as(frozen).to(frozen.dtype), frozen)  # (B, T, d)


class ExtendedHead(nn.Module):
    """The output head of an LM plus the added rows: logits over the V tokens of its tokenizer and the new ones."""

    added: AddedTokens

    def __init__(self, frozen: nn.Linear, added: AddedTokens) -> None:
        super().__init__()
        self.frozen = frozen
        hold(self, "added", added)

    @property
    def weight(self) -> Tensor:
        """The frozen matrix."""
        return self.frozen.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., first + n); ids between V and the first added one, and followers, get -inf."""
        added = self.added
        frozen = self.frozen(hidden)[..., : added.vocab_size]  # (..., V)
        new = hidden @ added.output.to(hidden.dtype).T  # (..., n - f)

        def barred(count: int) -> Tensor:  # (..., count)
            return new.new_full((*new.shape[:-1], count), -torch.inf)

        placeholders = barred(added.first - added.vocab_size)  # such as <|image|>
        return torch.cat([frozen, placeholders, new, barred(added.num_followers)], dim=-1)  # (..., first + n)
