"""Object queries: their place in a prompt, where they begin, and the index tokens that point at what they found.

    <|query|> x N      after the instruction; the i-th takes row i of the trained (N, d) as its input embedding
    <d0> ... <dN-1>    in answers: <di> points at the box of query i

The sequential counterpart has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fromage.data.tokenizer import PromptTokenizer
from fromage.models.language_model import LanguageModel
from fromage.models.prompts import Part, Token

QUERY = "<|query|>"  # a place of its own in the tokenizer, which the embeddings of the object queries take
NOISE = 0.1  # its norm in an initial query, in mean norms of an embedding


def index_token_names(num_queries: int) -> list[str]:
    """<d0> ... <dN-1>."""
    return [f"<d{i}>" for i in range(num_queries)]


def query_tokens(tokenizer: PromptTokenizer, num_queries: int) -> list[Part]:
    """The object queries as parts of a prompt."""
    return [Token(tokenizer.added[QUERY])] * num_queries


def initial_queries(lm: LanguageModel, n: int) -> Tensor:
    """Initial queries (n, d): the embedding of '.', where a language model has gathered what was said, plus noise."""
    device = lm.hf.get_input_embeddings().frozen.weight.device
    full_stop = lm.embed(torch.tensor(lm.tokenizer.encode("."), device=device))[-1].detach().float().cpu()  # (d,)
    scale: Any = lm.added.mean_norm.cpu() / lm.width**0.5
    return full_stop + NOISE * torch.randn(n, lm.width) * scale
