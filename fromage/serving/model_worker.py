"""The work of the model thread: answers batches of conversations and of searches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fromage.errors import UserError
from fromage.generation.chat import Chat
from fromage.generation.decoding import GREEDY
from fromage.generation.generate import Answer, AnswerStream, generate, stream
from fromage.generation.options import Decoding
from fromage.generation.retrieved import RetrievedImages
from fromage.generation.styles import find_style
from fromage.models.fromage import Fromage
from fromage.models.prompts import Part, Starts, prompt_length
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.queries import query_rows

IMAGES = 32  # images encoded at a time
Put = Callable[[str | RetrievedImages], None]  # takes a piece of an answer


@dataclass(frozen=True)
class ModelRequest:
    """A request for the model. A Tensor among the parts is the pixels (3, H, W) of an image, or its features (m,).

    Attributes:
        messages: of a conversation: system prompt, said, answered, ..., said; of a search: the query alone.
        decoding: options for the answer, without the stop texts of the style.
        k: number of images to find in a search.
        where: a filter over the metadata; '' for all images. Searches of a batch have the same.
        gone: set when nobody waits for the answer any more; a conversation then ends at the next token.
    """

    messages: list[list[Part]]
    decoding: Decoding = GREEDY
    k: int = 1
    where: str = ""
    gone: Event = field(default_factory=Event, compare=False)

    def group(self) -> Decoding | None:
        """Requests with equal groups can form a batch. None: alone, since rows of a batch have different seeds."""
        return None if self.decoding.temperature > 0 and self.decoding.seed is not None else self.decoding


@dataclass(frozen=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt: tokens of the prompt, k for each image.
        answer: tokens of the answer.
        cut: whether it ended only because it had as many as it may.
    """

    prompt: int
    answer: int
    cut: bool


class ModelWorker:
    """Answers requests. Only one thread can call it."""

    def __init__(
        self,
        model: Fromage,
        index: ImageIndex | None,
        style: str | None,
        took: Callable[[Usage], None] = lambda usage: None,
        between: Callable[[], object] = lambda: None,
    ) -> None:
        """took: told what each answer took. between: called between the tokens of answers, by whichever thread decodes.

        Raises UserError for an unknown style and for an index of another model."""
        if index is not None:
            index.require_model(model)
        self.model, self.index, self.style, self.took = model, index, style, took
        self.between = between
        self.stop = find_style(style, model).stop

    def chat(self, requests: list[ModelRequest]) -> list[tuple[Answer, Usage]]:
        """Answers to conversations with the same decoding options; retrieved images are not opened."""
        prompts, decoding = [self._prompt(request) for request in self._encoded(requests)], self._decoding(requests[0])
        how: dict[str, Any] = {"batch_size": len(prompts), "between": self.between}
        how["wanted"] = lambda number: not requests[number].gone.is_set()
        answers = generate(self.model, prompts, decoding, self.index, **how)
        return [(answer, self._usage(prompt, answer)) for prompt, answer in zip(prompts, answers, strict=True)]

    def stream(self, requests: list[tuple[ModelRequest, Put]]) -> list[Usage]:
        """The answer to one conversation, piece by piece, until nobody waits for it."""
        ((request, put),) = requests
        prompt, decoding = self._prompt(*self._encoded([request])), self._decoding(request)
        with closing(stream(self.model, prompt, decoding, self.index, between=self.between)) as pieces:
            for piece in pieces:
                if request.gone.is_set():
                    break
                put(piece)
        return [self._usage(prompt, pieces)]

    def _usage(self, prompt: list[Part], answer: Answer | AnswerStream) -> Usage:
        usage = Usage(prompt_length(self.model, prompt), len(answer.ids), answer.cut)
        self.took(usage)
        return usage

    def embed(self, requests: list[list[ModelRequest]]) -> list[tuple[np.ndarray, int]]:
        """For each of some lists of B queries: their rows (B, q), and the number of their tokens."""
        queries = [request.messages[0] for request in self._encoded([one for some in requests for one in some])]
        rows = iter(query_rows(self.model, queries))  # (q,) each
        sizes = iter([prompt_length(self.model, query, Starts.ONCE) for query in queries])
        return [(np.stack([*islice(rows, len(some))]), sum(islice(sizes, len(some)))) for some in requests]

    @torch.no_grad()
    def search(self, requests: list[ModelRequest]) -> list[RetrievedImages]:
        """The images nearest to each query, not opened; of queries with the same filter."""
        if self.index is None:
            raise UserError("this server has no index of images; start it with --index")
        where = requests[0].where
        if where:
            self.index.filter(where)  # a faulty one is refused before the work
        rows = query_rows(self.model, [request.messages[0] for request in self._encoded(requests)])  # (B, q)
        found = self.index.search(rows, max(request.k for request in requests), where=where)
        nearest = map(partial(self.index.beyond, where=where), rows, found)
        return [
            RetrievedImages(row, list(islice(hits, request.k)), rest=hits)
            for row, hits, request in zip(rows, nearest, requests, strict=True)
        ]

    def _decoding(self, request: ModelRequest) -> Decoding:
        return replace(request.decoding, stop=(*request.decoding.stop, *self.stop))

    def _prompt(self, request: ModelRequest) -> list[Part]:
        """The prompt of a conversation; turns that do not fit the language model are left out, oldest first."""
        system, *turns, said = request.messages
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        return Chat(self.model, None, request.decoding, self.style, system, pairs).prompt(said)

    @torch.no_grad()
    def _encoded(self, requests: Sequence[ModelRequest]) -> list[ModelRequest]:
        """The requests with features (m,) in place of pixels; all their images are encoded together."""
        messages = [message for request in requests for message in request.messages]
        pixels = [part for message in messages for part in message if isinstance(part, Tensor)]
        chunks = [pixels[start : start + IMAGES] for start in range(0, len(pixels), IMAGES)]
        rows = iter([row for chunk in chunks for row in self.model.vision(torch.stack(chunk))])  # (m,) each
        return [
            replace(
                request,
                messages=[[next(rows) if isinstance(part, Tensor) else part for part in m] for m in request.messages],
            )
            for request in requests
        ]
