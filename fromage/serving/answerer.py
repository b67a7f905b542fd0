"""What the server's one thread does with the model: conversations and searches, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fromage.chat import STYLES, Chat
from fromage.decoding import GREEDY, Decoding
from fromage.errors import UserError
from fromage.gallery import Shown
from fromage.generate import Answer, generate, stream
from fromage.hits import Hit
from fromage.index import ImageIndex
from fromage.model import Fromage
from fromage.prompts import Part, embed_for_retrieval

PICTURES = 32  # through the tower at a time
Put = Callable[[str | Shown], bool]  # takes a piece of an answer; whether more are wanted


@dataclass(frozen=True)
class Asked:
    """A request. A Tensor among the parts is a picture's pixels (3, H, W), or its features (m,) once they are made.

    Attributes:
        messages: of a conversation: system prompt, said, answered, ..., said; of a search: the query alone.
        decoding: of the answer to a conversation, without the stop texts of the style.
        k: pictures to find in a search.
    """

    messages: list[list[Part]]
    decoding: Decoding = GREEDY
    k: int = 1

    def group(self) -> Decoding | None:
        """What requests must have in common to be answered together; None: alone, as a seed counts on from row to row."""
        return None if self.decoding.temperature > 0 and self.decoding.seed is not None else self.decoding


class Answerer:
    """Answers requests. Only one thread may call it."""

    def __init__(self, model: Fromage, index: ImageIndex | None, style: str) -> None:
        self.model, self.index, self.style = model, index, style

    def chat(self, asked: list[Asked]) -> list[Answer]:
        """Answers to conversations of the same decoding; the pictures they show are not opened."""
        prompts = [self._prompt(request) for request in self._encoded(asked)]
        return generate(self.model, prompts, self._decoding(asked[0]), self.index, batch_size=len(prompts))

    def stream(self, asked: list[tuple[Asked, Put]]) -> list[None]:
        """The answer to one conversation, piece by piece, until no more is wanted."""
        ((request, put),) = asked
        prompt = self._prompt(*self._encoded([request]))
        with closing(stream(self.model, prompt, self._decoding(request), self.index)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                if not put(piece):
                    break
        return [None]

    @torch.no_grad()
    def search(self, asked: list[Asked]) -> list[list[Hit]]:
        """The pictures nearest to each query: text and pictures as they are read in front of [RET], a picture alone as
        it is embedded in an index."""
        if self.index is None:
            raise UserError("this server has no index of pictures; start it with --index")
        queries = [[p for p in request.messages[0] if not isinstance(p, str) or p] for request in self._encoded(asked)]
        alone = torch.tensor([len(query) == 1 and isinstance(query[0], Tensor) for query in queries])  # (B,)
        rows = torch.empty(len(queries), self.model.q)  # (B, q)
        pictures = [query[0] for query, is_alone in zip(queries, alone, strict=True) if is_alone]
        if pictures:
            rows[alone] = self.model.embed_images(torch.stack(pictures)).cpu()  # type: ignore[arg-type]
        prompts = [query for query, is_alone in zip(queries, alone, strict=True) if not is_alone]
        rows[~alone] = embed_for_retrieval(self.model, prompts, max(1, len(prompts))).cpu()
        found = self.index.search(rows.numpy(), max(request.k for request in asked))
        return [hits[: request.k] for hits, request in zip(found, asked, strict=True)]

    def _decoding(self, asked: Asked) -> Decoding:
        return replace(asked.decoding, stop=(*asked.decoding.stop, *STYLES[self.style].stop))

    def _prompt(self, asked: Asked) -> list[Part]:
        """What was said and answered, as much of it as the language model has positions for, the oldest left out first."""
        system, *turns, said = asked.messages
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        return Chat(self.model, None, asked.decoding, self.style, system, pairs).prompt(said)

    @torch.no_grad()
    def _encoded(self, asked: Sequence[Asked]) -> list[Asked]:
        """The requests with features for pixels: the pictures of all of them go through the tower together."""
        messages = [message for request in asked for message in request.messages]
        pixels = [part for message in messages for part in message if isinstance(part, Tensor)]
        chunks = [pixels[start : start + PICTURES] for start in range(0, len(pixels), PICTURES)]
        rows = iter([row for chunk in chunks for row in self.model.vision(torch.stack(chunk))])  # (m,) each
        return [
            replace(
                request,
                messages=[[next(rows) if isinstance(part, Tensor) else part for part in m] for m in request.messages],
            )
            for request in asked
        ]
