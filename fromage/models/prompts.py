"""Prompts: interleaved text and images -> input embeddings of the language model.

    [W_c v(x)] [</s>] "a cat and" [W_c v(y)] [</s>] "its dog" ...      an image is its visual prefix, k embeddings

In training an image stands in front of the </s> of its caption, in one such pair or two, and a caption that [RET] closes has
one </s>. `Starts` names the forms of prompts that follow from this; a model whose `start` is 'first' has one form,

    [</s>] [W_c v(x)] "a cat and" [W_c v(y)] "its dog" ...

in training too. A batch is padded on the left, so that all prompts end
where generation begins.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, groupby
from pathlib import Path
from typing import Protocol, TypeGuard

import torch
from PIL import Image
from torch import Tensor

from fromage.checks import ADDRESSES, HALVES, as_list
from fromage.data.padding import pad
from fromage.data.tokenizer import PromptTokenizer
from fromage.errors import BrokenSample, UserError
from fromage.images.codec import take_in
from fromage.images.open import open_image
from fromage.models.base import VisualPrefixLM


class Url(str):
    """The http(s) address of an image."""


def path_or_url(name: str) -> Path | Url:
    """The place that a name of an image means: an address where it begins with http:// or https://, else a path."""
    return Url(name) if name.startswith(ADDRESSES) else Path(name)


class Special(Enum):
    """Tokens that text in a prompt cannot produce."""

    RET = "[RET]"
    START = "start"  # which token it is, if any, the tokenizer says


RET = Special.RET  # asks for an image
START = Special.START  # </s> at a place of one's own; a prompt that has one gets no other


@dataclass(frozen=True)
class Token:
    """A token by its id: a special one, as chat templates have them, or an added one. A prompt that has one gets no </s>."""

    id: int


class Starts(Enum):
    """Where </s> stands in a prompt. It always stands after the images that lead, as in captioning training.

    Attributes:
        EACH: after every image too, a last one included: text that follows an image begins as a caption does in training.
            For generated and scored text.
        ONCE: nowhere else: a text that [RET] closes has one </s> in training. For retrieval queries.
    """

    EACH = "each"
    ONCE = "once"


# Path: an image file, or 'shard.tar#key'. Tensor: features (m,) of an image that has been encoded before.
ImageInput = Image.Image | Path | Url | Tensor
Part = str | ImageInput | Special | Token  # a str is always text, never a path or address
Prompt = Sequence[Part] | Part


@dataclass(frozen=True)
class Prompts:
    """A batch of B prompts, left-padded to T tokens.

    Attributes:
        ids: (B, T); k <|image|> tokens for each image.
        mask: (B, T) bool, False at padding.
        embeds: (B, T, d).
        features: (n, m) of the distinct images of the batch.
        image_rows: for each prompt, the rows of features of its images, in order.
    """

    ids: Tensor
    mask: Tensor
    embeds: Tensor
    features: Tensor
    image_rows: list[list[int]]


def parts_of(prompt: Prompt) -> list[Part]:
    """A prompt as a list of parts; a single part is a prompt too. Raises UserError for other types and invalid text."""
    parts: list[Part] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]  # type: ignore[list-item]
    for part in parts:
        if not isinstance(part, (str, ImageInput, Special, Token)):
            raise UserError(f"a prompt holds text, images, paths and addresses of images, not {type(part).__name__}")
        if isinstance(part, str) and HALVES.search(part):
            raise UserError(f"{part[:50]!r}: holds half a character (a surrogate); leave it out")
    return parts


def listed(prompts: Sequence[Prompt] | Part) -> list[Prompt]:
    """Prompts as a list: one text, path or image on its own is one prompt, never its letters."""
    return [prompts] if isinstance(prompts, Tensor) and prompts.ndim == 1 else as_list(prompts, Image.Image, Special, Token)


def is_text(part: Part | None) -> TypeGuard[str]:
    """Whether a part is text, and no address of an image."""
    return isinstance(part, str) and not isinstance(part, Url)


def joined(parts: Sequence[Part]) -> list[Part]:
    """Parts with adjacent texts joined to one, since a tokenizer puts a space with the word after it; empty ones left out.

    Spaces at the end of a text in front of [RET] are stripped: in training no caption ends in one.
    """
    out: list[Part] = []
    for text, group in groupby(parts, is_text):
        run: list[Part] = list(group)
        if run[0] is RET and out and is_text(out[-1]):
            run[:0] = filter(None, [out.pop().rstrip()])  # type: ignore[union-attr]
        out += filter(None, ["".join(map(str, run))]) if text else run
    return out


def started(parts: Sequence[Part], starts: Starts, first: bool = False) -> list[Part]:
    """Parts with START where the form has it; parts that hold one already, or a Token of a template, are unchanged.

    first: whether the model's start token stands in front of all, and nowhere else.
    """
    if first and not any(isinstance(part, Token) for part in parts):
        kept = [part for part in parts if part is not START]
        pairs = zip([START, *kept], kept, strict=False)  # texts that START stood between get a space there
        return [START, *(f" {part}" if is_text(part) and is_text(before) else part for before, part in pairs)]
    if any(part is START or isinstance(part, Token) for part in parts):
        return list(parts)
    out: list[Part] = []
    for part in (*parts, None):  # None: the end
        opens = not out or isinstance(out[-1], ImageInput)
        if starts is Starts.ONCE and opens:
            opens = all(isinstance(earlier, ImageInput) for earlier in out)
        if opens and not isinstance(part, ImageInput):
            out.append(START)
        if part is not None:
            out.append(part)
    return out


def batches_by_length(prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
    """The numbers of prompts in batches of like lengths, in characters of text, so that they need little padding.

    The longest come first: what does not fit in memory fails at once.
    """
    sizes = [sum(len(part) for part in parts_of(prompt) if is_text(part)) for prompt in prompts]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class PromptLayout(Protocol):
    """What decides the token ids of a prompt's parts; every model has it."""

    @property
    def tokenizer(self) -> PromptTokenizer:
        """Of the language model, with the added tokens."""

    @property
    def k(self) -> int:
        """Input embeddings per image."""


def prompt_ids(model: VisualPrefixLM, prompt: Prompt, starts: Starts = Starts.EACH) -> list[int]:
    """The token ids of a prompt: k times <|image|> for each image, which is not opened."""
    parts = parts_of(prompt)
    if any(is_text(part) and RET.value in str(part) for part in parts):
        warnings.warn("'[RET]' within a text is plain text; to ask for an image, pass fromage.RET as a part", stacklevel=2)
    whole = started(joined(parts), starts, model.start_first)
    return list(chain.from_iterable(part_ids(model, part) for part in whole))


def part_ids(layout: PromptLayout, part: Part) -> list[int]:
    """The token ids of one part of a prompt."""
    tokenizer = layout.tokenizer
    if isinstance(part, ImageInput):
        return [tokenizer.image_id] * layout.k
    if isinstance(part, Token):
        return [part.id]
    if part is RET:
        if not tokenizer.ret_ids:
            raise UserError("this model does not answer with images: leave [RET] out of its prompts")
        return tokenizer.ret_ids
    return tokenizer.start() if part is START else tokenizer.encode(str(part))


def prompt_length(model: VisualPrefixLM, prompt: Prompt, starts: Starts = Starts.EACH) -> int:
    """Number of tokens of a prompt, including each </s> and k for each image; no image is opened."""
    return len(prompt_ids(model, prompt, starts))


@torch.no_grad()
def embed_prompts(model: VisualPrefixLM, prompts: Sequence[Prompt], room: int = 0, starts: Starts = Starts.EACH) -> Prompts:
    """One or more prompts -> a left-padded batch. The tower encodes each distinct image once, all of them in one pass.

    room: tokens to be generated after each prompt, which must fit too. An empty prompt is </s> alone. Raises UserError for
    prompts that are too long, for images that cannot be opened or fetched, and for an empty prompt where the language model
    has no </s>.
    """
    prompts = listed(prompts)
    rows = [prompt_ids(model, prompt, starts) for prompt in prompts]
    _check_lengths(model, [len(row) for row in rows], room)
    ids, mask = pad(rows, model.tokenizer.pad_id, "left")  # (B, T) each
    images = [[part for part in parts_of(prompt) if isinstance(part, ImageInput)] for prompt in prompts]
    distinct = {_key(image): image for row in images for image in row}
    number = {key: i for i, key in enumerate(distinct)}
    image_rows = [[number[_key(image)] for image in row] for row in images]
    features = encode_images(model, list(distinct.values()))  # (n, m)
    every_row = list(chain.from_iterable(image_rows))  # of all images in all prompts
    prefix = model.visual_prefix(features)[every_row]  # (n, k, d) -> (images in all prompts, k, d)
    ids = ids.to(model.device)  # (B, T)
    return Prompts(ids, mask.to(model.device), model.embed(ids, prefix), features, image_rows)


def _key(image: ImageInput) -> int | str:
    """A key that is equal for the same file, address or object."""
    if isinstance(image, Path):
        return str(image.resolve())
    return str(image) if isinstance(image, Url) else id(image)


def _check_lengths(model: VisualPrefixLM, lengths: list[int], room: int) -> None:
    longest, limit = max(lengths), model.lm.max_length
    if limit is not None and longest + room > limit:
        after = f" and {room} after it" if room else ""
        raise UserError(f"a prompt of {longest} tokens{after} is more than the {limit} of the language model; shorten it")
    if not min(lengths):
        raise UserError("the prompt is empty, and this language model has no start token; write at least one word")


def encode_images(model: VisualPrefixLM, images: Sequence[ImageInput]) -> Tensor:
    """n images -> (n, m) features in float32; the tower encodes those that are not features yet, in one pass.

    Raises UserError for an image that cannot be opened or fetched, and for features that do not fit this tower.
    """
    images = listed(images)  # type: ignore[assignment]
    for image in images:
        if isinstance(image, Tensor) and not (image.shape == model.vision.shape and image.isfinite().all()):
            raise UserError(
                f"an image's features of shape {tuple(image.shape)}: must be {tuple(model.vision.shape)} finite numbers"
            )
    pixels = [model.vision.transform(_open(image)) for image in images if not isinstance(image, Tensor)]
    made = iter(model.vision(torch.stack(pixels)) if pixels else ())  # (N, 3, H, W) -> (N, m)
    rows = [image.to(model.device) if isinstance(image, Tensor) else next(made) for image in images]
    return torch.stack([row.float() for row in rows]) if rows else torch.empty(0, *model.vision.shape, device=model.device)


def _open(image: Image.Image | Path | Url) -> Image.Image:
    if isinstance(image, Path):
        return open_image(str(image))
    if isinstance(image, Url):
        from fromage.images.fetch import FRESH, fetch_image  # not open_image, which would also read local files

        return fetch_image(image, max_age=FRESH)
    try:
        return take_in(image)
    except BrokenSample as error:
        raise UserError(f"an image that was passed as an object: {error}; pass another one") from error
