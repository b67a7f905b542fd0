"""Figures of a FROMAGe on captioned photographs: recall, queries that grow, captions, examples in the prompt, questions.

tools/run_photos.py takes them. M photographs with features (M, m), and for each its captions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from study import Figures
from torch import Tensor

from fromage.data.broken import Broken, read_shards
from fromage.data.sample_images import from_npy
from fromage.data.shard_names import expand
from fromage.data.shard_sizes import sized
from fromage.data.shards import captions_of
from fromage.evals.captioning import caption_figures
from fromage.evals.few_shot import examples
from fromage.generation.generate import caption_images, generate
from fromage.generation.options import Decoding
from fromage.generation.preset import Preset
from fromage.generation.ret_tuning import read_messages, tune_ret
from fromage.generation.score import score
from fromage.models.fromage import Fromage
from fromage.models.prompts import Prompt
from fromage.retrieval.metrics import ranks, recall_at, retrieval_recalls

SENTENCES = 5  # captions of a photograph, as Flickr8k and COCO have
SHOTS = (0, 1, 2, 4)
ASKED = "Q: what is in the picture?\nA: "


class Photographs(NamedTuple):
    """Stored features (M, m), the captions of each photograph, and its name in the caption file."""

    features: Tensor
    captions: list[list[str]]
    names: list[str]

    @property
    def owners(self) -> Tensor:
        """(N,) the photograph of each caption."""
        return torch.tensor([i for i, some in enumerate(self.captions) for _ in some])

    @property
    def texts(self) -> list[str]:
        """All N captions."""
        return [text for some in self.captions for text in some]


def read(shards: Iterable[str | Path]) -> Photographs:
    """Photographs of shards with stored features."""
    features, captions, names = [], [], []
    for place in shards:
        listed = expand(str(place))
        for raw in read_shards(sized(listed), Broken(1.0)):
            features.append(from_npy(raw["npy"]).float())
            captions.append(captions_of(raw))
            names.append(json.loads(raw["json"])["source"])
    return Photographs(torch.stack(features), captions, names)


def recalls(model: Fromage, data: Photographs) -> Figures:
    """R@1, 5 and 10 both ways, of all captions."""
    return retrieval_recalls(model.embed_text(data.texts), embed_images(model, data), data.owners)


def embed_images(model: Fromage, data: Photographs) -> Tensor:
    """(M, q) unit rows."""
    with torch.no_grad():
        return model.embed_images(data.features)


def chance(photographs: int) -> Figures:
    """R@k of a random order, one photograph in M being right."""
    return {f"t2i_r{k}": 100 * k / photographs for k in (1, 5, 10)}


class Ridge:
    """The linear baseline: ridge regression from the mean of a caption's frozen input embeddings to image features."""

    def __init__(self, model: Fromage, data: Photographs, weight: float) -> None:
        """weight: of the squared coefficients, in units of the inputs' variance."""
        self.model = model
        x, v = self.mean_embeddings(data.texts), data.features[data.owners]  # (N, d), (N, m)
        self.x, self.v = x.mean(0), v.mean(0)
        x = x - self.x
        gram = x.T @ x + weight * len(x) * x.var() * torch.eye(x.shape[1])  # (d, d)
        self.map = torch.linalg.solve(gram, x.T @ (v - self.v))  # (d, m)

    @torch.no_grad()
    def mean_embeddings(self, texts: Sequence[str]) -> Tensor:
        """(N, d)."""
        ids = [torch.tensor(self.model.tokenizer.encode(text)) for text in texts]
        return torch.stack([self.model.lm.embed(row).float().mean(0) for row in ids])

    def recalls(self, data: Photographs) -> Figures:
        """R@1, 5 and 10 both ways, by the cosine of centred features."""
        texts = F.normalize((self.mean_embeddings(data.texts) - self.x) @ self.map, dim=-1)  # (N, m)
        return retrieval_recalls(texts, F.normalize(data.features - self.v, dim=-1), data.owners)


def growing(model: Fromage, data: Photographs, seen: bool = True) -> Figures:
    """R@1 of queries of 1 to 5 captions of one photograph: one text, turns of a dialogue, other photographs between, means.

    Between two captions stands the photograph that looks most like it (the next one like it, between the next two), which
    is a candidate all the same. means: of the embeddings of the captions taken alone. seen: whether the visual prefix was
    trained; without it no photographs stand between.
    """
    kept = [i for i, some in enumerate(data.captions) if len(some) >= SENTENCES]
    images, own = embed_images(model, data), torch.tensor(kept)
    alike = F.normalize(data.features, dim=-1) @ F.normalize(data.features, dim=-1).T  # (M, M)
    near = alike.fill_diagonal_(-1).topk(SENTENCES - 1).indices  # (M, 4)
    single = model.embed_text([text for i in kept for text in data.captions[i][:SENTENCES]])
    single = single.unflatten(0, (len(kept), SENTENCES))  # (K, 5, q)
    found: Figures = {}
    for n in range(1, SENTENCES + 1):
        texts = [data.captions[i][:n] for i in kept]
        queries: dict[str, list[Prompt]] = {
            "text": [" ".join(some) for some in texts],
            "dialogue": ["\n".join(f"{ASKED}{text}" for text in some) for some in texts],
        }
        if seen:
            between = ([data.features[j] for j in near[i, : n - 1]] for i in kept)
            queries["others between"] = [_alternate(*both) for both in zip(texts, between, strict=True)]
        rows = {name: model.embed_text(some, batch_size=32) for name, some in queries.items() if n > 1 or name == "dialogue"}
        rows |= {"mean": F.normalize(single[:, :n].mean(1), dim=-1)}
        rows = {name: single[:, 0] for name in queries if name != "dialogue"} | rows
        found |= {f"{name}, {n}": recall_at(ranks(some, images, own))["r1"] for name, some in rows.items()}
    return found


def _alternate(texts: Sequence[str], images: Sequence[Tensor]) -> Prompt:
    """text, image, text, ..., text."""
    return [part for text, image in zip(texts, images, strict=False) for part in (text, image)] + [texts[-1]]


def captions(model: Fromage, data: Photographs) -> Figures:
    """Greedy captions against those of people."""
    return caption_figures(caption_images(model, data.features), data.captions)


def few_shot(model: Fromage, data: Photographs, limit: int) -> Figures:
    """CIDEr and BLEU-4 of greedy captions after 0, 1, 2 and 4 other photographs with theirs, in a row as pairs of training.

    After examples the model begins a new line before its caption; the caption is the first line that is not empty.
    """
    count, found = min(limit, len(data.names)), {}
    for n in SHOTS:
        prompts: list[Prompt] = []
        for i in range(count):
            shown = [(data.features[j], data.captions[j][0]) for j in examples(i, n, count)]
            prompts.append([*(part for pair in shown for part in pair), data.features[i]])
        made = generate(model, prompts, Decoding(32, stop=(".",), max_images=0), batch_size=32)
        figures = caption_figures([answer.text.strip().partition("\n")[0] for answer in made], data.captions[:count])
        found |= {f"{name}, {n} shown": figures[name] for name in ("cider", "bleu4")}
    return found


class PhotoQuestion(NamedTuple):
    """Of one photograph, by number, with its answers; right is one of them, by number."""

    photograph: int
    text: str
    answers: Sequence[str]
    right: int


def ask(instances: Path, data: Photographs) -> dict[str, list[PhotoQuestion]]:
    """Yes-or-no questions, each kind of thing asked for as often where it is as where it is not, and questions how many.

    instances: boxes of the photographs, in COCO's format.
    """
    content = json.loads(instances.read_text())
    kinds = {kind["id"]: kind["name"] for kind in content["categories"]}
    number = {image["id"]: data.names.index(image["file_name"]) for image in content["images"]}
    there: dict[int, Counter[str]] = {i: Counter() for i in number.values()}
    for box in content["annotations"]:
        there[number[box["image_id"]]][kinds[box["category_id"]]] += 1
    exists, many = [], []
    for kind in kinds.values():
        shown = [i for i, things in there.items() if things[kind]]
        others = [i for i in there if i not in shown]
        for i, other in zip(shown, others[: len(shown)], strict=False):
            asked = f"Is there a {kind} in the picture?"
            exists += [PhotoQuestion(i, asked, (" Yes", " No"), 0), PhotoQuestion(other, asked, (" Yes", " No"), 1)]
        numbers = [" one", " two", " three", " four"]
        counted = [i for i in shown if there[i][kind] <= len(numbers)]
        many += [PhotoQuestion(i, f"How many of {kind} are in the picture?", numbers, there[i][kind] - 1) for i in counted]
    return {"yes or no": exists, "how many": many}


def answers(model: Fromage, data: Photographs, questions: Sequence[PhotoQuestion], n: int) -> Figures:
    """Share of the questions whose right answer is the likeliest, after n others with theirs; with images and without."""
    return {
        name: 100 * sum(map(partial(_is_right, model, data, questions, n, blind), range(len(questions)))) / len(questions)
        for name, blind in (("right", False), ("right without images", True))
    }


def _is_right(
    model: Fromage, data: Photographs, questions: Sequence[PhotoQuestion], n: int, blind: bool, number: int
) -> bool:
    question, prompt = questions[number], []
    for other in examples(number, n, len(questions)):
        prompt += _asked(data, questions[other], blind, questions[other].answers[questions[other].right] + "\n")
    prompt += _asked(data, question, blind, "")
    return int(score(model, prompt, question.answers).total.argmax()) == question.right


def _asked(data: Photographs, question: PhotoQuestion, blind: bool, answer: str) -> list[Tensor | str]:
    text = f"Question: {question.text} Answer:{answer}"
    return [text] if blind else [data.features[question.photograph], text]


def asking(model: Fromage, style: str) -> Figures:
    """Whether an image comes when one is asked for, and not otherwise: written requests, and as many other sentences.

    A chat's first turn in a style, answers of at most 16 tokens. Half of the sentences choose a bias of [RET]; of the others
    the share that bring an image without it and with it. right: balanced accuracy with it.
    """
    texts = read_messages(Path(__file__).parent / "photo_requests.json")
    tuned = tune_ret(model, texts, Preset(style=style, decoding=Decoding(16)))
    found = {"bias": tuned.bias, "right where it was chosen": tuned.accuracy, "right": tuned.judged}
    for name, shown in (("as trained", tuned.before), ("with bias", tuned.after)):
        found |= {f"{kind}, {name}": share for kind, share in shown.items()}
    return found
