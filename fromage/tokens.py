"""Text to token ids: the language model's own tokenizer with two tokens more, <|image|> and [RET]."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from fromage.errors import UserError, first_line

IMAGE, RET = "<|image|>", "[RET]"


class PromptTokenizer:
    """The tokenizer of a causal LM plus the two tokens of FROMAGe, at the authors' ids (50265 and 50266 for OPT).

    <|image|> marks the k places of a picture in a sequence of ids; it has no embedding of its own. [RET] asks for a
    picture; its embedding is trained (fromage.added_tokens).

    Attributes:
        vocab_size: tokens of the frozen LM, V; the ids below it are its own.
        bos_id: what every text starts with (OPT: 2, </s>), or None for an LM without one.
        pad_id: right padding; always masked, so an LM without padding uses its end-of-text id.
    """

    def __init__(self, folder: str) -> None:
        """Load from a folder or a model hub name. Raises UserError where there is no tokenizer."""
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            raise UserError(
                f"no tokenizer at {folder} ({first_line(error)}); give a folder that holds one, "
                f"or fetch it where there is a network: hf download {folder}"
            ) from error
        self.vocab_size = len(self.hf)
        self.hf.add_tokens([IMAGE, RET], special_tokens=True)
        ids: Any = self.hf.convert_tokens_to_ids([IMAGE, RET])
        self.image_id, self.ret_id = int(ids[0]), int(ids[1])
        self.bos_id: int | None = self.hf.bos_token_id
        self.eos_id: int | None = self.hf.eos_token_id
        pad = self.hf.pad_token_id if self.hf.pad_token_id is not None else self.eos_id
        self.pad_id: int = 0 if pad is None else pad

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
