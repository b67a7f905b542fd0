"""What the server's one thread does with the model: conversations and searches, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from fromage.errors import UserError
from fromage.generation.chat import Chat, find_style
from fromage.generation.decoding import GREEDY, Decoding
from fromage.generation.generate import Answer, generate, stream
from fromage.generation.retrieved import Shown
from fromage.models.fromage import Fromage
from fromage.models.prompts import Part
from fromage.retrieval.faiss_index import ImageIndex
from fromage.retrieval.queries import embed_queries

IMAGES = 32  # through the tower at a time
Put = Callable[[str | Shown], bool]  # takes a piece of an answer; whether more are wanted


@dataclass(frozen=True)
class Asked:
    """A request. A Tensor among the parts is an image's pixels (3, H, W), or its features (m,) once they are made.

    Attributes:
        messages: of a conversation: system prompt, said, answered, ..., said; of a search: the query alone.
        decoding: of the answer to a conversation, without the stop texts of the style.
        k: images to find in a search.
    """

    messages: list[list[Part]]
    decoding: Decoding = GREEDY
    k: int = 1

    def group(self) -> Decoding | None:
        """What requests must have in common to be answered together; None: alone, as a seed counts on from row to row."""
        return None if self.decoding.temperature > 0 and self.decoding.seed is not None else self.decoding


class ModelWorker:
    """Answers requests. Only one thread may call it."""

    def __init__(self, model: Fromage, index: ImageIndex | None, style: str) -> None:
        """Raises UserError where there is no such style, and for an index of another model."""
        if index is not None:
            index.require_model(model)
        self.model, self.index, self.style, self.stop = model, index, style, find_style(style).stop

    def chat(self, asked: list[Asked]) -> list[Answer]:
        """Answers to conversations of the same decoding; the images they show are not opened."""
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
    def search(self, asked: list[Asked]) -> list[Shown]:
        """The images nearest to each query, not opened."""
        if self.index is None:
            raise UserError("this server has no index of images; start it with --index")
        rows = embed_queries(self.model, [request.messages[0] for request in self._encoded(asked)]).cpu().numpy()  # (B, q)
        found = self.index.search(rows, max(request.k for request in asked))
        nearest = map(self.index.beyond, rows, found)
        return [
            Shown(row, list(islice(hits, request.k)), rest=hits)
            for row, hits, request in zip(rows, nearest, asked, strict=True)
        ]

    def _decoding(self, asked: Asked) -> Decoding:
        return replace(asked.decoding, stop=(*asked.decoding.stop, *self.stop))

    def _prompt(self, asked: Asked) -> list[Part]:
        """What was said and answered, as much of it as the language model has positions for, the oldest left out first."""
        system, *turns, said = asked.messages
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        return Chat(self.model, None, asked.decoding, self.style, system, pairs).prompt(said)

    @torch.no_grad()
    def _encoded(self, asked: Sequence[Asked]) -> list[Asked]:
        """The requests with features for pixels: the images of all of them go through the tower together."""
        messages = [message for request in asked for message in request.messages]
        pixels = [part for message in messages for part in message if isinstance(part, Tensor)]
        chunks = [pixels[start : start + IMAGES] for start in range(0, len(pixels), IMAGES)]
        rows = iter([row for chunk in chunks for row in self.model.vision(torch.stack(chunk))])  # (m,) each
        return [
            replace(
                request,
                messages=[[next(rows) if isinstance(part, Tensor) else part for part in m] for m in request.messages],
            )
            for request in asked
        ]
