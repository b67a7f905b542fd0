"""ChatIR: dialogues find an image among a pool, round by round (Levy et al., NeurIPS 2023).

Round 0 is the caption alone, round N the caption and N questions with their answers, joined by ', '. Hits@10 is the share of
dialogues whose image is among the first ten. The published figures are cumulative: a dialogue that had a hit in any round
so far counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fromage.data.annotation_formats import read_annotations
from fromage.data.annotations import FILE, TEXT, FieldType, Schema, fitting
from fromage.errors import UserError
from fromage.evals.contextual import ContextualRun, Query, RetrievalTask, Side
from fromage.evals.options import Options
from fromage.evals.report import Figures, Report, System
from fromage.images.regions import below
from fromage.models.fromage import Fromage
from fromage.retrieval.metrics import chance_within

DIALOGUE: Schema = {"img": FILE, "dialog": FieldType("a list of texts", lambda value: _texts(value))}
HITS, SEPARATOR = 10, ", "
POOL, DIALOGUES = 50_000, 2064  # of the published figures
PLAIN, CUMULATIVE = "hits10", "hits10_cumulative"
PROTOCOL = {
    "round_N": "caption and N rounds of question and answer, joined by ', '; [RET] after them",
    PLAIN: "share of the dialogues whose image is among the first ten in this round",
    CUMULATIVE: "the same in this round or an earlier one, as published",
    "gallery": "the pool",
    "clip": "the same text, cut at the length of its context (OpenAI's: 77 tokens)",
    "chance": "a random order in each round",
    "ranks": "exact; ties count against the model",
}
# The authors' model, BLIP trained on dialogues: in the words of their abstract 64 % for the caption, and after five rounds
# over 78 % where a language model asks, 75 % where people ask.
PUBLISHED = {"VisDial_v1.0_queries_val": 75.0, "ChatGPT_BLIP2": 78.0}


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(TEXT.fits, value)) and bool(value[0].strip())


@dataclass(frozen=True)
class Chats:
    """Dialogues about images, and the pool that they search.

    Attributes:
        dialogues: (image, caption and rounds) each.
        published: whether these are the data of the published figures, whole.
    """

    name: str
    dialogues: list[tuple[Path, list[str]]]
    pool: list[Path]
    published: bool = False

    @property
    def rounds(self) -> int:
        """The longest dialogue's rounds of question and answer."""
        return max(len(texts) for _, texts in self.dialogues) - 1


def read_chats(dialogues: Path, pool: Path, images: Path, limit: int | None = None) -> Chats:
    """Dialogues in ChatIR's JSON.

    Args:
        dialogues: a list of {"img": place, "dialog": [caption, "question? answer", ...]}.
        pool: a list of places: Search_Space_val_50k.json.
        images: the folder that these places are relative to, or the one that holds the images themselves.
        limit: dialogues at most; None for all.

    Raises UserError for files that are missing, broken or of another kind, and for images that the pool lacks.
    """
    _, content = read_annotations(dialogues, ("dialogues of ChatIR",), "VisDial_v1.0_queries_val.json of ChatIR")
    _, listed = read_annotations(pool, ("a list of images",), "Search_Space_val_50k.json of ChatIR")
    places = {name: below(images, name) for name in listed if FILE.fits(name)}
    entries = fitting(dialogues, "dialogues", content, DIALOGUE)
    if lacking := [entry["img"] for entry in entries if entry["img"] not in places]:
        raise UserError(f"{pool}: lacks {len(lacking)} images of the dialogues ({lacking[0]}); take both files of one split")
    if not entries:
        raise UserError(f"{dialogues}: holds no dialogue; fetch the file again")
    talks = [(places[entry["img"]], entry["dialog"]) for entry in entries[:limit]]
    whole = len(entries) == DIALOGUES and len(places) == POOL and limit is None
    return Chats(dialogues.name, talks, list(places.values()), whole)


@torch.no_grad()
def evaluate(model: Fromage, data: Chats, options: Options | None = None) -> Report:
    """Hits@10 by round, plain and cumulative, of FROMAGe, CLIP and chance, in percent.

    A dialogue that is shorter than another keeps its last text. Raises UserError for too many images lost.
    """
    run = ContextualRun(model, data.name, [*data.pool, *(image for image, _ in data.dialogues)], options)
    talks = run.keep(data.dialogues, lambda talk: talk[:1])
    pool = run.images(data.pool)
    right = [pool.numbers([image]) for image, _ in talks]
    tasks = {}
    for n in range(data.rounds + 1):
        said = [SEPARATOR.join(texts[: n + 1]) for _, texts in talks]
        tasks[f"round_{n}"] = RetrievalTask(Side(f"round {n}", [Query([text], text) for text in said]), pool, right)
    figures = {who: hits_by_round(list(found.values())) for who, found in run.places(tasks).items()}
    figures["chance"] = chance_by_round(len(pool.items), data.rounds)
    sizes = {"gallery": len(pool.items), "queries": len(talks)}
    skipped = {"dialogues with a lost image": len(data.dialogues) - len(talks)}
    return run.report("chatir", figures, sizes, skipped, PROTOCOL, {} if run.encoded.lost else published(data), list(tasks))


def hits_by_round(places: list[Tensor]) -> System:
    """Hits@10 of each round, from the places (N, 1) of the right images in it."""
    rank = torch.stack([place[:, 0] for place in places])  # (rounds, N)
    best = rank.cummin(0).values  # (rounds, N)
    shares = {name: (some <= HITS).double().mean(1).mul(100).tolist() for name, some in ((PLAIN, rank), (CUMULATIVE, best))}
    return {f"round_{n}": {name: values[n] for name, values in shares.items()} for n in range(len(rank))}


def chance_by_round(pool: int, rounds: int) -> System:
    """hits_by_round expected of a random order of the pool in each round."""
    hit = chance_within(HITS, pool)

    def figures(n: int) -> Figures:
        return {PLAIN: 100 * hit, CUMULATIVE: 100 * (1 - (1 - hit) ** (n + 1))}

    return {f"round_{n}": figures(n) for n in range(rounds + 1)}


def published(data: Chats) -> dict[str, System]:
    """The authors' figures, where the data are theirs."""
    after_five = PUBLISHED.get(Path(data.name).stem)
    if not data.published or after_five is None:
        return {}
    return {"ChatIR BLIP": {"round_0": {CUMULATIVE: 64.0}, "round_5": {CUMULATIVE: after_five}}}
