"""Text to token ids: the language model's tokenizer with added tokens (<|image|>, [RET]), and truncation of captions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import AddedToken, AutoTokenizer

from fromage.errors import UserError, first_line

IMAGE_TOKEN, RET_TOKEN = "<|image|>", "[RET]"
SENTENCEPIECE_SPACE = "\u2581"  # how tokens of SentencePiece begin that follow a space


def ret_tokens(r: int) -> list[str]:
    """The tokens that end a caption and ask for an image: [RET], and after it [RET2] ... [RETr]."""
    return [RET_TOKEN, *(f"{RET_TOKEN[:-1]}{i}]" for i in range(2, r + 1))]


class PromptTokenizer:
    """The tokenizer of a causal LM plus two kinds of added tokens: places, then rows.

    A place is replaced by other embeddings, as <|image|> by the k embeddings of an image; it has no embedding of its own. A
    row has a trained embedding (fromage.models.special_tokens), as [RET]. FROMAGe's two have the ids of the released code
    (50265 and 50266 for OPT). With r > 1, [RET] stands for r tokens in a row, of which the first is chosen and the others
    follow it: `ret_tokens`. Only this class knows which they are.

    Attributes:
        added: ids of the added tokens, by text.
        trained_ids: consecutive ids of the rows among them.
        ret_ids: ids of the r [RET] tokens, in order; empty for a tokenizer without [RET].
        vocab_size: V, tokens of the frozen LM, with ids below V.
        bos_id: first token of every text (OPT: 2, </s>), or None. If the tokenizer's own opens chat turns (<|im_start|>),
            <|endoftext|> is used instead: in pretraining it stood between texts.
        pad_id: id of padding, which is always masked; the end-of-text id if the LM has no padding token.
    """

    def __init__(self, folder: str, rows: Sequence[str] = (RET_TOKEN,), places: Sequence[str] = (IMAGE_TOKEN,)) -> None:
        """Load from a folder or a hub name. Raises UserError if no tokenizer is found."""
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            raise UserError(
                f"no tokenizer at {folder} ({first_line(error)}); give a folder that holds one, "
                f"or fetch it where there is a network: hf download {folder}"
            ) from error
        self.vocab_size = len(self.hf)
        source = self._template_source()
        self._name_special(source)
        self.hf.add_tokens([*places, *rows], special_tokens=True)
        convert: Any = self.hf.convert_tokens_to_ids
        self.added = {token: int(convert(token)) for token in (*places, *rows)}
        self.trained_ids = [self.added[token] for token in rows]
        self.ret_ids = [self.added[token] for token in ret_tokens(len(rows)) if token in self.added]
        opens_turns = self.hf.bos_token is not None and self.hf.bos_token in source
        self.bos_id: int | None = self.special_id("<|endoftext|>") if opens_turns else self.hf.bos_token_id
        self.eos_id: int | None = self.hf.eos_token_id
        pad = self.hf.pad_token_id if self.hf.pad_token_id is not None else self.eos_id
        self.pad_id: int = 0 if pad is None else pad

    @property
    def image_id(self) -> int:
        """Id of <|image|>."""
        return self.added[IMAGE_TOKEN]

    @property
    def ret_id(self) -> int:
        """Id of [RET], the first of ret_ids. Raises KeyError for a tokenizer without it."""
        return self.added[RET_TOKEN]

    @property
    def never_predicted(self) -> list[int]:
        """Ids that no model predicts: <|image|>, and the [RET] tokens after the first, which follow it by rule."""
        return [self.image_id, *self.ret_ids[1:]]

    def encode(self, text: str) -> list[int]:
        """Ids of a text without a start token; '[RET]' or '</s>' within it are plain text."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)

    @property
    def has_template(self) -> bool:
        """Whether it is an instruct model's, with a chat template."""
        return bool(self.hf.chat_template)

    def special_id(self, text: str) -> int | None:
        """The id of a special token by its whole text; None for other texts and for the added tokens."""
        return self._specials.get(text)

    def markup(self, text: str) -> list[str | int]:
        """A text by a chat template, cut at its special tokens: texts, and ids in place of special tokens.

        A user's text must not come here. '[RET]' and '<|image|>' stay text.
        """
        pieces = self._special.split(text) if self._specials else [text]  # text, token, text, ..., text
        return [self._specials[piece.strip()] if i % 2 else piece for i, piece in enumerate(pieces) if piece]

    def _template_source(self) -> str:
        """The text of all chat templates."""
        templates = self.hf.chat_template or ""
        return "".join(templates.values()) if isinstance(templates, dict) else templates

    def _name_special(self, source: str) -> None:
        """Mark as special every token that a chat template names, so that no text can become one (`encode`)."""
        for token in self.hf.added_tokens_decoder.values():
            if not token.special and token.content.strip() and token.content in source:
                sides = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": token.normalized}
                self.hf.add_tokens([AddedToken(token.content, special=True, **sides)], special_tokens=True)
        named = {i: token for i, token in self.hf.added_tokens_decoder.items() if token.special and token.content.strip()}
        self._specials = {token.content.strip(): i for i, token in named.items()}
        longest = sorted(named.values(), key=lambda token: -len(token.content))
        swallowed = (r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in longest)
        self._special = re.compile(f"({'|'.join(swallowed)})")

    def start(self) -> list[int]:
        """The ids at the front of every prompt: [bos], or none."""
        return [] if self.bos_id is None else [self.bos_id]

    def caption(self, text: str, max_tokens: int) -> list[int]:
        """[bos] y_1 ... y_n [RET], truncated to max_tokens with all r [RET] kept at its end, as in the released code."""
        ids = self.start() + self.encode(text)
        return [*ids[: max(max_tokens - len(self.ret_ids), 0)], *self.ret_ids]

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens; a space in front of the first word stays, for every kind of tokenizer."""
        specials = self._specials.values()
        kept = [i for i in ids if i < self.vocab_size and i not in specials]
        text = self.hf.decode(kept, skip_special_tokens=True)
        spaced = bool(kept) and (self.hf.convert_ids_to_tokens(kept[0]) or "").startswith(SENTENCEPIECE_SPACE)
        return f" {text}" if spaced and not text.startswith(" ") else text  # decoders such as LLaMA's strip it
