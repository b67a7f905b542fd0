"""Visual Dialog: which answer is the right one, and which image is talked about? (section 4.2, table 2)"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fromage.errors import UserError
from fromage.evals.answers import PROTOCOLS, answer_figures, chance_figures, score_answers
from fromage.evals.clip import load_clip_baseline
from fromage.evals.dialogues import Dialogue, Dialogues, spoken
from fromage.evals.report import System, make_report
from fromage.models.fromage import Fromage
from fromage.retrieval.encode import Options, encode_files, in_batches
from fromage.retrieval.metrics import chance, rank_figures, ranks

AUTHORS = "_authors"
PROTOCOL = {
    "answers": "log-likelihood of ' candidate.' behind image, </s>, rounds as 'Q: ...? A: ....' and 'Q: ...? A:'",
    "answers_authors": "the released code's: rounds as lines, </s> in front of the candidate, logits at a token judged "
    "against this very token, and NDCG of the round behind the rated one",
    "N_rounds": "the image of a dialogue among all, by 'Q: ...? A: ....' of its first N rounds and [RET], without caption",
    "N_rounds_authors": "the released code's way round: the dialogue of an image among all",
    "clip": "the rounds as one text, cut at 77 tokens",
    "ranks": "exact; ties count against the model; in NDCG they share their places' gain",
}
HEADLINE = (*PROTOCOLS, "1_rounds", "5_rounds", "10_rounds", "10_rounds_authors")
PAPER = {
    "fromage": {
        "answers_authors": {"ndcg": 16.6, "mrr": 22.0, "r1": 17.6, "r5": 20.0, "r10": 24.4},
        "10_rounds_authors": {"r1": 20.8, "r5": 44.9, "r10": 56.0},
    },
    "clip": {"10_rounds_authors": {"r1": 17.7, "r5": 38.9, "r10": 50.2}},
}


@torch.no_grad()
def evaluate(
    model: Fromage, data: Dialogues, options: Options | None = None, answers: bool = True, scores: Path | None = None
) -> dict[str, Any]:
    """Answers ranked, in both protocols; and images found with 0 to all rounds, both ways, beside CLIP and chance.

    answers: whether answers are ranked, which takes longest. scores: a folder to take it up from, see score_answers.
    Raises UserError for too many images lost, and as score_answers does.
    """
    options = options or Options()
    encoded = encode_files(model, [talk.image for talk in data.dialogues], options)
    talks = [talk for talk in data.dialogues if talk.image in encoded.row]
    if not talks:
        raise UserError(f"{data.name}: no image of its dialogues can be had; name the right --images")
    features = encoded.of([talk.image for talk in talks])  # (D, m)
    size, counts = options.batch_size, range(len(talks[0].rounds) + 1)
    embed = partial(model.embed_text, batch_size=size)
    queries = {n: in_batches(embed, _said(talks, n), size, f"{n} rounds") for n in counts}
    systems = {"fromage": curve(queries, model.embed_images(features))}
    if options.clip:
        clip = load_clip_baseline(model)
        texts = {n: in_batches(clip.embed_text, _said(talks, n), size, f"{n} rounds, CLIP") for n in counts}
        systems["clip"] = curve(texts, clip.embed_features(features))
    systems["chance"] = {setting: chance(len(talks)) for setting in systems["fromage"]}
    if answers:
        made = score_answers(model, talks, features, scores)
        ranked = {name: answer_figures(made[name], talks, name.endswith(AUTHORS)) for name in PROTOCOLS}
        systems["fromage"] = ranked | systems["fromage"]
        systems["chance"] |= dict.fromkeys(PROTOCOLS, chance_figures(talks))
    sizes = {"gallery": len(talks), "queries": len(talks), "candidates": len(talks[0].rounds[0].candidates)}
    skipped = {"dialogues with a lost image": len(data.dialogues) - len(talks)}
    return make_report("visdial", model, systems, PROTOCOL, data.name, sizes, encoded, skipped, PAPER, HEADLINE)


def _said(talks: list[Dialogue], rounds: int) -> list[str]:
    return [spoken(talk.rounds[:rounds]) for talk in talks]


def curve(queries: dict[int, Tensor], images: Tensor) -> System:
    """Figures by the number of rounds in a query, (D, e) each, and of the other way round; image i belongs to query i."""
    own = torch.arange(len(images), device=images.device)
    right_way = {f"{n}_rounds": rank_figures(ranks(rows, images, own)) for n, rows in queries.items()}
    return right_way | {f"{n}_rounds{AUTHORS}": rank_figures(ranks(images, rows, own)) for n, rows in queries.items()}
