"""Generation: interleaved text and images go in, and come out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fromage.checks import check_whole
from fromage.generation.decoding import GREEDY, Decoding, Draft, write
from fromage.generation.retrieved import Resolve, RetrievedImages, Shown
from fromage.models.fromage import Fromage
from fromage.models.prompts import START, ImageInput, Prompt, Url, embed_prompts, encode_images

if TYPE_CHECKING:
    from fromage.retrieval.faiss_index import ImageIndex


@dataclass(frozen=True)
class Answer:
    """Text and images in the order they came, and the tokens, without the </s> that ended them."""

    parts: list[str | Shown]
    ids: list[int]

    @classmethod
    def of(cls, pieces: Iterable[str | Shown], ids: Iterable[int] = ()) -> Answer:
        """From the pieces of `stream`: neighbouring texts become one."""
        parts: list[str | Shown] = []
        for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
            same: list[Any] = list(group)
            parts += ["".join(same)] if is_text else same
        return cls(parts, list(ids))

    @property
    def text(self) -> str:
        """The words alone."""
        texts = (part.strip() for part in self.parts if isinstance(part, str))
        return " ".join(text for text in texts if text)

    @property
    def shown(self) -> list[Shown]:
        """What stands for each [RET]."""
        return [part for part in self.parts if isinstance(part, Shown)]


def generate(
    model: Fromage,
    prompts: Sequence[Prompt],
    decoding: Decoding = GREEDY,
    index: ImageIndex | None = None,
    resolve: Resolve | None = None,
    batch_size: int = 64,
) -> list[Answer]:
    """Answer each prompt.

    Args:
        index: where the images are; built with this very model.
        resolve: opens the images found, as retrieval.results.load_images does. In place of one that is gone the next best
            is shown, with a note. Without, Shown.rest goes on where its hits end.
        batch_size: prompts decoded at a time.

    Raises:
        UserError: a prompt and its answer are longer than the language model's positions, an image cannot be had, or the
            index was built with another model.
    """
    check_whole("batch_size", batch_size, 1)
    if index is not None:
        index.require_model(model)
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        embedded = embed_prompts(model, batch, decoding.max_new_tokens)
        pieces: list[list[Any]] = [[] for _ in batch]
        drafts = [Draft(model, decoding, row.append) for row in pieces]
        write(model, embedded, decoding, drafts, start)
        for row, prompt in enumerate(batch):
            features = embedded.features[embedded.shown[row]]  # (n, m)
            gallery = RetrievedImages(model, index, resolve, decoding.images_per_ret, prompt, features)
            answers.append(Answer.of(map(gallery.piece, pieces[row]), drafts[row].ids))
    return answers


def stream(
    model: Fromage,
    prompt: Prompt,
    decoding: Decoding = GREEDY,
    index: ImageIndex | None = None,
    resolve: Resolve | None = None,
) -> Iterator[str | Shown]:
    """The answer to one prompt, piece by piece as it is decoded; Answer.of puts the pieces together.

    Decoding runs in a thread of its own and goes on while a piece is looked at; closing the iterator stops it.
    Arguments and errors are those of generate; what is wrong with the prompt is raised at once.
    """
    if index is not None:
        index.require_model(model)
    embedded = embed_prompts(model, [prompt], decoding.max_new_tokens)
    gallery = RetrievedImages(model, index, resolve, decoding.images_per_ret, prompt, embedded.features)
    pieces: SimpleQueue[Any] = SimpleQueue()
    draft = Draft(model, decoding, pieces.put)

    def work() -> None:
        try:
            write(model, embedded, decoding, [draft])
            pieces.put(None)
        except BaseException as error:  # raised where it is awaited
            pieces.put(error)

    def read() -> Iterator[str | Shown]:
        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield gallery.piece(piece)
        finally:
            draft.done = True
            thread.join()

    return read()


def caption(model: Fromage, images: str | ImageInput | Sequence[str | ImageInput], max_new_tokens: int = 32) -> list[str]:
    """Greedy captions of images: opened ones, paths, addresses or features (m,). One image is a list of one.

    max_new_tokens: length of a caption at most, in tokens. Raises UserError for an image that cannot be opened.
    """
    listed = [images] if isinstance(images, (str, ImageInput)) else list(images)
    named = [_located(image) if isinstance(image, str) else image for image in listed]
    return caption_images(model, encode_images(model, named), max_new_tokens) if named else []


def _located(name: str) -> Path | Url:
    return Url(name) if name.startswith(("http://", "https://")) else Path(name)


def caption_images(model: Fromage, features: Tensor, max_new_tokens: int = 32, batch_size: int = 128) -> list[str]:
    """Greedy captions of (N, m) image features: [W_c v(x)] [</s>] and on, without [RET], up to the end of the sentence.

    max_new_tokens: length of a caption at most, in tokens. A caption ends at </s> or a line break.
    """
    decoding = Decoding(max_new_tokens, stop="\n", max_images=0)
    return [answer.text for answer in generate(model, [[row, START] for row in features], decoding, batch_size=batch_size)]
