"""Generation: answers of text and images to prompts of text and images; captions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fromage.checks import check_whole
from fromage.config import CAPTION_LENGTH
from fromage.errors import UserError
from fromage.generation.decoding import GREEDY, PartialAnswer, decode
from fromage.generation.options import Decoding
from fromage.generation.preset import read_preset
from fromage.generation.retrieved import ImageRetriever, Resolve, RetrievedImages
from fromage.images.open import open_image
from fromage.models.fromage import Fromage
from fromage.models.prompts import ImageInput, Prompt, embed_prompts, encode_images, listed, path_or_url
from fromage.retrieval.results import POOL

if TYPE_CHECKING:
    from fromage.retrieval.base import ImageIndex


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        parts: text and retrieved images in the order of decoding.
        ids: the tokens, without a final </s>.
        cut: whether it ended only because it had as many tokens as it may.
    """

    parts: list[str | RetrievedImages]
    ids: list[int]
    cut: bool = False

    @classmethod
    def of(cls, pieces: Iterable[str | RetrievedImages], ids: Iterable[int] = (), cut: bool = False) -> Answer:
        """Build an answer from the pieces of `stream`; adjacent texts are joined."""
        parts: list[str | RetrievedImages] = []
        for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
            same: list[Any] = list(group)
            parts += ["".join(same)] if is_text else same
        return cls(parts, list(ids), cut)

    @property
    def text(self) -> str:
        """The text alone, without images."""
        texts = (part.strip() for part in self.parts if isinstance(part, str))
        return " ".join(text for text in texts if text)

    @property
    def shown(self) -> list[RetrievedImages]:
        """The images retrieved for each [RET], in order."""
        return [part for part in self.parts if isinstance(part, RetrievedImages)]


class AnswerStream(Generator[str | RetrievedImages]):
    """The pieces of an answer while it is decoded; closing it stops decoding."""

    def __init__(self, pieces: Generator[str | RetrievedImages], draft: PartialAnswer) -> None:
        self._pieces, self._draft = pieces, draft

    @property
    def ids(self) -> list[int]:
        """The tokens so far."""
        return self._draft.ids

    @property
    def cut(self) -> bool:
        """Whether it has ended only because it had as many tokens as it may."""
        return self._draft.cut

    def send(self, value: None) -> str | RetrievedImages:
        """The next piece; that of the generator's protocol."""
        return self._pieces.send(value)

    def throw(self, *error: Any) -> str | RetrievedImages:
        """Stop decoding by an exception."""
        return self._pieces.throw(*error)


def generate(
    model: Fromage,
    prompts: Sequence[Prompt],
    decoding: Decoding = GREEDY,
    index: ImageIndex | None = None,
    resolve: Resolve | None = None,
    batch_size: int = 64,
    between: Callable[[], object] = lambda: None,
    wanted: Callable[[int], bool] = lambda number: True,
) -> list[Answer]:
    """Answer each prompt.

    Args:
        index: index of the images to retrieve, built with the same model.
        resolve: opens the images found, as retrieval.results.load_images does. An image that cannot be opened is replaced
            by the next best, with a note. If None, images stay unopened, and RetrievedImages.rest has the hits that follow.
        batch_size: prompts decoded at a time.
        between: called after each token, by the thread that decodes; see fromage.generation.decoding.decode.
        wanted: asked after each token for the number of each prompt; an answer that is not wanted any more ends there.

    Raises:
        UserError: a prompt and its answer do not fit the language model's positions, an image cannot be opened or fetched,
            or the index was built with another model.
    """
    check_whole("batch_size", batch_size, 1)
    if index is not None:
        index.require_model(model)
    prompts, answers = listed(prompts), []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        embedded = embed_prompts(model, batch, decoding.max_new_tokens)
        pieces: list[list[Any]] = [[] for _ in batch]
        drafts = [PartialAnswer(model, decoding, row.append) for row in pieces]

        def after_each(start: int = start, drafts: Sequence[PartialAnswer] = drafts) -> None:
            between()
            for number, draft in enumerate(drafts, start):
                draft.done = draft.done or not wanted(number)

        decode(model, embedded, decoding, drafts, start, after_each)
        for row, prompt in enumerate(batch):
            features = embedded.features[embedded.image_rows[row]]  # (images of the prompt, m)
            retriever = ImageRetriever(model, index, resolve, decoding.images_per_ret, prompt, features)
            answers.append(Answer.of(map(retriever.piece, pieces[row]), drafts[row].ids, drafts[row].cut))
    return answers


def stream(
    model: Fromage,
    prompt: Prompt,
    decoding: Decoding = GREEDY,
    index: ImageIndex | None = None,
    resolve: Resolve | None = None,
    between: Callable[[], object] = lambda: None,
) -> AnswerStream:
    """The answer to one prompt, piece by piece while it is decoded; Answer.of joins the pieces.

    Decoding runs in a thread of its own and does not wait for the caller; closing the iterator stops it. Arguments and
    errors are those of generate; errors in the prompt are raised by this call, not by the iterator.
    """
    if index is not None:
        index.require_model(model)
    embedded = embed_prompts(model, [prompt], decoding.max_new_tokens)
    retriever = ImageRetriever(model, index, resolve, decoding.images_per_ret, prompt, embedded.features)
    pieces: SimpleQueue[Any] = SimpleQueue()
    draft = PartialAnswer(model, decoding, pieces.put)

    def work() -> None:
        try:
            decode(model, embedded, decoding, [draft], between=between)
            pieces.put(None)
        except BaseException as error:  # raised in the caller's thread
            pieces.put(error)

    def read() -> Generator[str | RetrievedImages]:
        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield retriever.piece(piece)
        finally:
            draft.done = True
            thread.join()

    return AnswerStream(read(), draft)


def caption(
    model: Fromage, images: str | ImageInput | Sequence[str | ImageInput], max_new_tokens: int = CAPTION_LENGTH
) -> list[str]:
    """Greedy captions of images: opened ones, paths, addresses or features (m,). One image is a list of one.

    max_new_tokens: maximum length of a caption, in tokens. Raises UserError for an image that cannot be opened.
    """
    named: list[Any] = [path_or_url(image) if isinstance(image, str) else image for image in listed(images)]
    return caption_images(model, encode_images(model, named), max_new_tokens) if named else []


def caption_files(
    model: Fromage, names: Sequence[str], max_new_tokens: int = CAPTION_LENGTH, batch_size: int = 32
) -> Iterator[tuple[str, str | UserError]]:
    """Each name, a file's or an http(s) address, with the greedy caption of its image, or why it has none; in order."""
    for start in range(0, len(names), batch_size):
        some = names[start : start + batch_size]
        opened = list(POOL.map(partial(_pixels, model), some))
        pixels = [image for image in opened if isinstance(image, Tensor)]
        made = iter(caption_images(model, model.vision(torch.stack(pixels)), max_new_tokens) if pixels else ())  # (B, m)
        yield from (
            (name, next(made) if isinstance(image, Tensor) else image) for name, image in zip(some, opened, strict=True)
        )


def _pixels(model: Fromage, name: str) -> Tensor | UserError:
    try:
        return model.vision.transform(open_image(name))  # (3, H, W)
    except UserError as error:
        return error


def caption_images(
    model: Fromage, features: Tensor, max_new_tokens: int = CAPTION_LENGTH, batch_size: int = 128
) -> list[str]:
    """Greedy captions of (N, m) image features: continuations of [W_c v(x)] [</s> input_prompt], without [RET].

    max_new_tokens: maximum length of a caption, in tokens. A caption ends at </s>, at a line break, and at the texts at
    which the model's answers stop (`model.generation`): captioning is not trained to end. As in training, </s>
    follows the image. The model's input_prompt, if it has one, stands after it and is not part of the captions.
    """
    prompts = [[row, model.config.input_prompt] for row in features]  # an empty text is none
    found = generate(model, prompts, caption_decoding(model, max_new_tokens), batch_size=batch_size)
    return [answer.text.strip() for answer in found]


def caption_decoding(model: Fromage, max_new_tokens: int = CAPTION_LENGTH) -> Decoding:
    """How `caption_images` decodes."""
    return Decoding(max_new_tokens, stop=(*read_preset(model.generation).decoding.stop, "\n"), max_images=0)
