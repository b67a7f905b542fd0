"""Prompts: text and pictures in any order -> input embeddings of the language model.

    [</s>] "a cat" [W_c v(x)] "and its dog" ...      </s> once, at the front; each picture k embeddings, its visual prefix

A batch is padded on the left, so that all prompts end where generation begins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fromage.bounds import check_whole
from fromage.errors import BrokenSample, UserError
from fromage.model import Fromage
from fromage.picture_reader import PictureReader
from fromage.pictures import open_picture, take_in

HALVES = re.compile("[\ud800-\udfff]")  # of characters in UTF-16, which are none


class Url(str):
    """A picture's http(s) address."""


class Special(Enum):
    """Tokens that no text can spell."""

    RET = "[RET]"
    START = "</s>"
    QUERIES = "<|query|>"


RET = Special.RET  # asks for a picture
START = Special.START  # </s> at another place than the front: in training, captions have it behind their picture
QUERIES = Special.QUERIES  # all object queries of an Octopus

# Path: a picture's file, or 'shard.tar#key'. Tensor: features (m,) of a picture encoded before.
Picture = Image.Image | Path | Url | Tensor
Part = str | Picture | Special  # a plain str is text, whatever it looks like
Prompt = Sequence[Part] | Part


@dataclass(frozen=True)
class Prompts:
    """A batch of B prompts, left-padded to T tokens.

    Attributes:
        ids: (B, T); the places of pictures hold <|image|>.
        mask: (B, T) bool, whether there is a token.
        embeds: (B, T, d).
        features: (n, m) of the distinct pictures of the batch.
        shown: for each prompt, the rows of features that it shows, in order.
    """

    ids: Tensor
    mask: Tensor
    embeds: Tensor
    features: Tensor
    shown: list[list[int]]


def parts_of(prompt: Prompt) -> list[Part]:
    """A prompt as a list; a single part is a prompt too. Raises UserError for what can be no part, or no text."""
    parts: list[Part] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]  # type: ignore[list-item]
    for part in parts:
        if not isinstance(part, (str, Picture, Special)):
            raise UserError(f"a prompt holds text, pictures, paths and addresses of pictures, not {type(part).__name__}")
        if isinstance(part, str) and HALVES.search(part):
            raise UserError(f"{part[:50]!r}: holds half a character (a surrogate); leave it out")
    return parts


def worded(parts: Sequence[Part]) -> list[Part]:
    """Parts without empty texts."""
    return [part for part in parts if not (isinstance(part, str) and not part)]


def prompt_ids(model: PictureReader, prompt: Prompt) -> list[int]:
    """The token ids of a prompt, no picture opened: k times <|image|> for each. Every text is tokenised by itself."""
    parts = parts_of(prompt)
    front = [] if any(part is START for part in parts) else model.tokenizer.start()
    return [*front, *chain.from_iterable(part_ids(model, part) for part in parts)]


def part_ids(model: PictureReader, part: Part) -> list[int]:
    """The token ids of one part of a prompt."""
    tokenizer = model.tokenizer
    if isinstance(part, Picture):
        return [tokenizer.image_id] * model.k
    if part is RET:
        return [tokenizer.ret_id]
    if part is QUERIES:
        return [tokenizer.added[QUERIES.value]] * int(getattr(model, "n", 0))
    return tokenizer.start() if part is START else tokenizer.encode(str(part))


def prompt_length(model: PictureReader, prompt: Prompt) -> int:
    """Tokens of a prompt, </s> at the front and k for each picture included; no picture is opened."""
    return len(prompt_ids(model, prompt))


def max_length(model: PictureReader) -> int | None:
    """Tokens that the language model has positions for; None if it sets no limit."""
    return getattr(model.lm.hf.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def embed_prompts(model: PictureReader, prompts: Sequence[Prompt], room: int = 0) -> Prompts:
    """At least one prompt -> a left-padded batch. Each distinct picture goes through the tower once, all in one pass.

    room: tokens that must find a place behind each prompt. An empty prompt is </s> alone.
    Raises UserError for prompts that are too long, for pictures that cannot be had, and for an empty prompt to a language
    model that has no </s>.
    """
    rows = [prompt_ids(model, prompt) for prompt in prompts]
    _check_lengths(model, [len(row) for row in rows], room)
    ids, mask = pad_left(rows, model.tokenizer.pad_id)  # (B, T) each
    pictures = [[part for part in parts_of(prompt) if isinstance(part, Picture)] for prompt in prompts]
    distinct = {_key(picture): picture for row in pictures for picture in row}
    number = {key: i for i, key in enumerate(distinct)}
    shown = [[number[_key(picture)] for picture in row] for row in pictures]
    features = encode_pictures(model, list(distinct.values()))  # (n, m)
    prefix = model.prefix(features)[list(chain.from_iterable(shown))]  # (n, k, d) -> one for each place in the batch
    ids = ids.to(model.device)
    return Prompts(ids, mask.to(model.device), model.embed(ids, prefix), features, shown)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Lists of ids -> (B, T) left-padded to the longest, and (B, T) bool, whether there is a token."""
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)  # (B, 1)
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, pad_id, "left")  # (B, T)
    return ids, torch.arange(ids.shape[1]) >= ids.shape[1] - lengths


def _key(picture: Picture) -> int | str:
    """The same for the same file, address or object."""
    if isinstance(picture, Path):
        return str(picture.resolve())
    return str(picture) if isinstance(picture, Url) else id(picture)


def _check_lengths(model: PictureReader, lengths: list[int], room: int) -> None:
    longest, limit = max(lengths), max_length(model)
    if limit is not None and longest + room > limit:
        behind = f" and {room} behind it" if room else ""
        raise UserError(f"a prompt of {longest} tokens{behind} is more than the {limit} of the language model; shorten it")
    if not min(lengths):
        raise UserError("the prompt is empty, and this language model has no token to start from; give it a word")


def encode_pictures(model: PictureReader, pictures: Sequence[Picture]) -> Tensor:
    """(n, m) image features, in float32; the tower encodes those that are no features yet, in one pass.

    Raises UserError for a picture that cannot be had, and for what can be no features of this tower.
    """
    for picture in pictures:
        if isinstance(picture, Tensor) and not (picture.shape == model.vision.shape and picture.isfinite().all()):
            raise UserError(
                f"a picture's features of shape {tuple(picture.shape)}: must be {tuple(model.vision.shape)} finite numbers"
            )
    pixels = [model.vision.transform(_open(picture)) for picture in pictures if not isinstance(picture, Tensor)]
    made = iter(model.vision(torch.stack(pixels)) if pixels else ())
    rows = [picture.to(model.device) if isinstance(picture, Tensor) else next(made) for picture in pictures]
    return torch.stack([row.float() for row in rows]) if rows else torch.empty(0, *model.vision.shape, device=model.device)


def _open(picture: Image.Image | Path | Url) -> Image.Image:
    if isinstance(picture, Path):
        return open_picture(str(picture))
    if isinstance(picture, Url):
        from fromage.remote import fetch_picture  # never open_picture: the text of an address may name a file

        return fetch_picture(picture)
    try:
        return take_in(picture)
    except BrokenSample as error:
        raise UserError(f"a picture that was given opened: {error}; give another one") from error


@torch.no_grad()
def embed_for_retrieval(model: Fromage, prompts: Sequence[Prompt], batch_size: int = 32) -> Tensor:
    """Prompts -> (B, q) unit rows of the retrieval space: each with [RET] behind it, W_t h + b of the last hidden state."""
    check_whole("batch_size", batch_size, 1)
    behind = [RET] if model.pooling == "ret" else []
    out = [torch.empty(0, model.q, device=model.device)]
    for start in range(0, len(prompts), batch_size):
        batch = embed_prompts(model, [[*parts_of(prompt), *behind] for prompt in prompts[start : start + batch_size]])
        out.append(model.embed_ret(model.lm(batch.embeds, batch.mask)[:, -1]))
    return torch.cat(out)


@torch.no_grad()
def embed_queries(model: Fromage, queries: Sequence[Prompt]) -> Tensor:
    """Queries -> (B, q) unit rows: a picture alone as it is embedded in an index, all else with [RET] behind it."""
    rows = torch.empty(len(queries), model.q, device=model.device)  # (B, q)
    listed = [worded(parts_of(query)) for query in queries]
    alone = [i for i, query in enumerate(listed) if len(query) == 1 and isinstance(query[0], Picture)]
    others = [i for i in range(len(listed)) if i not in alone]
    rows[alone] = model.embed_images(encode_pictures(model, [listed[i][0] for i in alone]))  # type: ignore[misc]
    rows[others] = embed_for_retrieval(model, [listed[i] for i in others])
    return rows
