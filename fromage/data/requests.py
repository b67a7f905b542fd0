"""Captions framed as requests for an image (`data.requests`), so that [RET] also stands after what a person asks with."""

from __future__ import annotations

import random

REQUESTS = (
    "Show me: {}",
    "show me {}",
    "Show me a picture of {}.",
    "show me a photo of {}",
    "Can you show me {}?",
    "can I see a picture of {}?",
    "find a photo of {}",
    "Please find me an image of {}.",
    "I would like to see {}",
    "a picture of {}, please",
)


def request(caption: str, share: float, seed: int, key: str, epoch: int) -> str | None:
    """The caption within one of REQUESTS, or None where it stays as it is: 1 - share of them, and captions without a word.

    It stands there as a person types it: without its full stop, and after the first phrase only with its capital. Which
    captions and which phrase follow from seed, key of the image and epoch alone, so that a run repeats and resumes exactly.
    """
    rng = random.Random(f"{seed}/{key}/{epoch}/request")
    if rng.random() >= share:
        return None
    phrase, words = rng.choice(REQUESTS), caption.rstrip(" .")
    if not words:
        return None
    return phrase.format(words if phrase.endswith(": {}") else words[:1].lower() + words[1:])
