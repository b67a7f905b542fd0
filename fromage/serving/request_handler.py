"""From HTTP requests to the model thread and back: images are opened, jobs queued and awaited, replies built."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, zip_longest
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from fromage.checks import ADDRESSES
from fromage.data.image_source import without_folders
from fromage.errors import BrokenSample, UserError
from fromage.generation.generate import Answer
from fromage.generation.preset import Preset
from fromage.generation.retrieved import RetrievedImages
from fromage.images.codec import jpeg
from fromage.images.decode_process import decode_apart
from fromage.images.fetch import FRESH, fetch_image
from fromage.models.fromage import Fromage
from fromage.models.prompts import RET, Part
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.results import load_images
from fromage.serving.batching import Batcher, Capacity
from fromage.serving.image_ids import Gone, ImageIds
from fromage.serving.metrics import Metrics
from fromage.serving.model_worker import ModelRequest, ModelWorker, Usage
from fromage.serving.schema import (
    Address,
    ChatReply,
    ChatRequest,
    Content,
    FoundImage,
    ImagePart,
    Message,
    RetrievedPart,
    SearchReply,
    SearchRequest,
    Text,
    parts,
)

THREADS = {"sent": 4, "fetched": 8, "found": 8, "asked for": 4}  # that open images, by kind; each kind has its own limit
SMALL, LARGE = 256, 1024  # maximum side in pixels of an image in a reply, and of one requested by id
T = TypeVar("T")


class RequestHandler:
    """Answers requests.

    The answering methods raise UserError for a faulty request, and Busy or Closed of fromage.serving.batching.
    """

    def __init__(self, model: Fromage, index: ImageIndex | None, preset: Preset, capacity: Capacity) -> None:
        self.model, self.index, self.preset, self.capacity = model, index, preset, capacity
        self.metrics, self.ids = Metrics(), ImageIds(index)
        self.worker = ModelWorker(model, index, preset.style, self._count, lambda: self.batcher.let_pass())

    def open(self) -> None:
        """Start the thread that owns the model."""
        self.batcher = Batcher(self.capacity)
        self.metrics.queue.set_function(lambda: self.batcher.waiting)
        self._threads = {kind: ThreadPoolExecutor(count, kind) for kind, count in THREADS.items()}

    def close(self) -> None:
        """Refuse what waits and what comes."""
        self.batcher.close()
        for pool in self._threads.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _count(self, usage: Usage) -> None:
        self.metrics.prompt_tokens.inc(usage.prompt)
        self.metrics.generated_tokens.inc(usage.answer)

    async def chat(self, request: ChatRequest) -> ChatReply:
        """The answer to a conversation."""
        answer, _ = await self.answer(request)
        return self.reply(answer)

    async def answer(self, request: ChatRequest) -> tuple[Answer, Usage]:
        """The answer to a conversation, its images opened if they are wanted, and what it took."""
        prepared = await self._prepared(request)
        group = prepared.group() and ("chat", prepared.decoding)
        try:
            answer, usage = await asyncio.wrap_future(self.batcher.submit(self.worker.chat, prepared, group))
        finally:  # decoding for nobody would keep the others waiting
            prepared.gone.set()
        for shown in answer.shown:
            await self._illustrate(shown, request.images)
        return answer, usage

    async def pieces(self, request: ChatRequest) -> AsyncIterator[str | RetrievedImages | Usage]:
        """The answer to a conversation, piece by piece, and what it took; closing the iterator stops decoding."""
        prepared, loop = await self._prepared(request), asyncio.get_running_loop()
        queue: asyncio.Queue[str | RetrievedImages | None] = asyncio.Queue()

        def put(piece: str | RetrievedImages | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        future = self.batcher.submit(self.worker.stream, (prepared, put))
        future.add_done_callback(lambda _: put(None))
        try:
            while (piece := await queue.get()) is not None:
                if isinstance(piece, RetrievedImages):
                    await self._illustrate(piece, request.images)
                yield piece
            yield future.result()
        finally:
            prepared.gone.set()
            future.cancel()

    async def search(self, request: SearchRequest) -> SearchReply:
        """The images nearest to a query."""
        self.batcher.admit()
        prepared = ModelRequest([await self._parts(request.query)], k=request.k, where=request.where)
        group = ("search", request.where)
        shown = await asyncio.wrap_future(self.batcher.submit(self.worker.search, prepared, group, quick=True))
        await self._illustrate(shown, request.images)
        return SearchReply(hits=self.found(shown))

    async def embed(self, contents: list[list[Any]]) -> tuple[np.ndarray, int]:
        """Queries of text and images -> (B, q) unit rows, and the number of their tokens."""
        self.batcher.admit()
        prepared = [ModelRequest([await self._parts(content)]) for content in contents]
        return await asyncio.wrap_future(self.batcher.submit(self.worker.embed, prepared, "embed"))

    async def image(self, name: str) -> bytes:
        """An image of the index as JPEG. Raises UserError for an unknown id."""
        return await self._in_thread("asked for", lambda: jpeg(self.ids.open(name), LARGE))

    def reply(self, answer: Answer) -> ChatReply:
        """An answer as a message."""
        content: list[Any] = [self.part(piece) for piece in answer.parts]
        return ChatReply(message=Message(role="assistant", content=content))

    def part(self, piece: str | RetrievedImages) -> Text | RetrievedPart:
        """A piece of an answer."""
        return Text(text=piece) if isinstance(piece, str) else RetrievedPart(hits=self.found(piece))

    async def _illustrate(self, shown: RetrievedImages, images: bool) -> None:
        """If images are wanted, open small versions; the next best hit replaces an image that cannot be opened."""
        if images:
            hits = chain(shown.hits, shown.rest)
            opened, _ = await self._in_thread("found", load_images, hits, len(shown.hits), SMALL)
            shown.hits, shown.images = [hit for hit, _ in opened], [image for _, image in opened]

    async def _in_thread(self, kind: str, work: Callable[..., T], *args: Any) -> T:
        """Do what takes long without the model, beside the requests that come meanwhile. kind: of THREADS.

        Work that has begun keeps its thread to its end, also when its client has gone.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads[kind], partial(work, *args))

    async def _prepared(self, request: ChatRequest) -> ModelRequest:
        self.batcher.admit()
        messages = [message.content for message in request.messages]
        if request.messages[0].role != "system":
            messages.insert(0, self.preset.system)
        decoding = request.decoding.over(self.preset.decoding)
        return ModelRequest([await self._parts(content) for content in messages], decoding)

    async def _parts(self, content: Content) -> list[Part]:
        """The parts of a prompt, with pixels (3, H, W) for images."""
        made: list[Part] = []
        for part in parts(content):
            if isinstance(part, Text):
                made.append(part.text)
            elif isinstance(part, RetrievedPart):
                pixels = await asyncio.gather(*(self._in_thread("found", self._shown_before, hit.id) for hit in part.hits))
                made += [one for one in pixels if one is not None] or [RET]
            else:
                kind = "fetched" if isinstance(part, Address) else "sent"
                made.append(await self._in_thread(kind, lambda sent: self._pixels(_opened(sent)), part))
        return made

    def _pixels(self, image: Image.Image) -> Any:
        return self.model.vision.transform(image)

    def _shown_before(self, name: str) -> Any:
        """Pixels (3, H, W) of an image of the index; None if it can no longer be opened."""
        try:
            return self._pixels(self.ids.open(name))
        except Gone:
            return None

    def found(self, shown: RetrievedImages) -> list[FoundImage]:
        """Hits for a reply, without their paths."""
        return [
            FoundImage(
                id=self.ids.of(hit.path),
                rank=hit.rank,
                score=hit.score,
                caption=_sound(hit.caption),
                name=_sound(hit.name),
                key=_sound(hit.key),
                metadata=without_folders(hit.metadata),
                url=_sound(hit.path) if hit.path.startswith(ADDRESSES) else None,
                image=base64.b64encode(jpeg(image, SMALL)).decode() if image else None,
            )
            for hit, image in zip_longest(shown.hits, shown.images)
        ]


def _opened(part: ImagePart | Address) -> Image.Image:
    if isinstance(part, Address):
        return fetch_image(part.url, max_age=FRESH)
    try:
        return decode_apart(base64.b64decode(part.data, validate=True))
    except ValueError as error:
        raise UserError("an image's data is not base64; encode the file's bytes") from error
    except BrokenSample as error:
        raise UserError(f"an image that was sent: {error}; send JPEG or PNG") from error


def _sound(text: str) -> str:
    """Text that JSON can contain; file names can be invalid Unicode."""
    return text.encode("utf-8", "replace").decode()
