"""Text to token ids: the language model's own tokenizer with a few tokens more; for FROMAGe, <|image|> and [RET]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from fromage.errors import UserError, first_line

IMAGE, RET = "<|image|>", "[RET]"


class PromptTokenizer:
    """The tokenizer of a causal LM plus tokens of two kinds: places, then rows.

    A place marks where something else goes in a sequence of ids, as <|image|> the k embeddings of an image; it has no
    embedding of its own. A row's embedding is trained (fromage.models.special_tokens), as that of [RET], which asks for
    an image.
    FROMAGe's two stand at the authors' ids (50265 and 50266 for OPT).

    Attributes:
        added: the ids of the tokens added, by their text.
        row_ids: of those that are rows, consecutive.
        vocab_size: tokens of the frozen LM, V; the ids below it are its own.
        bos_id: what every text starts with (OPT: 2, </s>), or None for an LM without one.
        pad_id: right padding; always masked, so an LM without padding uses its end-of-text id.
    """

    def __init__(self, folder: str, rows: Sequence[str] = (RET,), places: Sequence[str] = (IMAGE,)) -> None:
        """Load from a folder or a model hub name. Raises UserError where there is no tokenizer."""
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            raise UserError(
                f"no tokenizer at {folder} ({first_line(error)}); give a folder that holds one, "
                f"or fetch it where there is a network: hf download {folder}"
            ) from error
        self.vocab_size = len(self.hf)
        self.hf.add_tokens([*places, *rows], special_tokens=True)
        convert: Any = self.hf.convert_tokens_to_ids
        self.added = {token: int(convert(token)) for token in (*places, *rows)}
        self.row_ids = [self.added[token] for token in rows]
        self.bos_id: int | None = self.hf.bos_token_id
        self.eos_id: int | None = self.hf.eos_token_id
        pad = self.hf.pad_token_id if self.hf.pad_token_id is not None else self.eos_id
        self.pad_id: int = 0 if pad is None else pad

    @property
    def image_id(self) -> int:
        """Of <|image|>."""
        return self.added[IMAGE]

    @property
    def ret_id(self) -> int:
        """Of [RET]. Raises KeyError for a tokenizer without it."""
        return self.added[RET]

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone: nothing in front, and words like '[RET]' or '</s>' in it read as plain text."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)

    def start(self) -> list[int]:
        """What stands once in front of a prompt: [bos], or nothing."""
        return [] if self.bos_id is None else [self.bos_id]

    def caption(self, text: str, max_tokens: int) -> list[int]:
        """[bos] y_1 ... y_n [RET], at most max_tokens long; [RET] is kept when the text is cut."""
        ids = self.start() + self.encode(text)
        return [*ids[: max_tokens - 1], self.ret_id]

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        return self.hf.decode([i for i in ids if i < self.vocab_size], skip_special_tokens=True)
