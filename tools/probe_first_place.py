"""Does a language model see what stands at the first place? Decides model.start for other language models than OPT.

    python tools/probe_first_place.py --lm smollm2

A word stands where an image would, a text follows, and the word's own likelihood after it is asked for: "dog", "The word
is:", and then "dog" again. A model that makes the first place an attention sink cannot repeat a word that stands there.
Printed is the mean log-likelihood of 24 nouns, in nats, for three texts: with the word before the start token
(`after_images`, the paper's), after it (`first`), and without it.
"""

from __future__ import annotations

import argparse

import torch

from fromage.models.language_model import LanguageModel, load_lm

NOUNS = [
    "dog", "cat", "horse", "car", "boat", "bird", "tree", "child", "man", "woman", "girl", "boy", "ball", "bike", "beach",
    "snow", "water", "grass", "mountain", "street", "train", "cow", "sheep", "house",
]  # fmt: skip
TEXTS = (" A photo of a", " There is a", " is a word. The word is:")


@torch.no_grad()
def likelihood(lm: LanguageModel, before: list[int], text: str, word: int) -> float:
    """log p(word | before, text), in nats."""
    ids = torch.tensor([[*before, *lm.tokenizer.encode(text)]])  # (1, T)
    hidden = lm(lm.embed(ids), torch.ones_like(ids, dtype=torch.bool))  # (1, T, d)
    return float(lm.logits(hidden[0, -1]).log_softmax(-1)[word])


def main() -> None:
    """Read the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lm", required=True, help="a name of the hub, a folder, gguf:FILE, or one of `fromage towers list`"
    )
    lm = load_lm(parser.parse_args().lm)
    start = lm.tokenizer.start()
    if not start:
        parser.error(f"{lm.name} has no start token, so nothing can stand in front of an image")
    words = [ids[0] for noun in NOUNS if len(ids := lm.tokenizer.encode(f" {noun}")) == 1]
    forms = {"after_images": lambda word: [word, *start], "first": lambda word: [*start, word], "without": lambda _: start}
    print(f"mean log-likelihood of {len(words)} nouns, in nats, {lm.name}\n")
    print(f"| the text after the word | {' | '.join(forms)} |\n|---{'|---' * len(forms)}|")
    for text in TEXTS:
        means = [sum(likelihood(lm, form(word), text, word) for word in words) / len(words) for form in forms.values()]
        print(f"| {text.strip()} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")


if __name__ == "__main__":
    main()
