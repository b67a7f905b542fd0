"""Visual Dialog (VisDial 1.0): which answer is the right one, and which image is talked about? (section 4.2, table 2)

Two tasks, each in two protocols, ours and the released code's, by which the paper's figures were made:

    answers, answers_authors          rank 100 candidates for each answer: ANSWER_PROTOCOLS says how they differ
    N_rounds, N_rounds_authors        N rounds find their image; with _authors an image finds its N rounds
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fromage.evals.contextual import ContextualRun, Query, RetrievalTask, Side
from fromage.evals.dialogues import Dialogue, Dialogues, spoken
from fromage.evals.options import Options
from fromage.evals.report import Figures, Report
from fromage.evals.scores import ScoreStore, identity
from fromage.generation.score import score
from fromage.images.transforms import Framing
from fromage.locks import held
from fromage.models.fromage import Fromage
from fromage.models.prompts import START, Part
from fromage.retrieval.metrics import mean_reciprocal_rank, ndcg, ranks_among, recall_at

AUTHORS = "_authors"


# --- the protocols of answers ----------------------------------------------------------------------------------------


class AnswerProtocol(NamedTuple):
    """How candidates are scored and rated.

    Attributes:
        prompt: (dialogue, round, features (m,) of its image) -> what a candidate continues.
        candidate: the text that is scored.
        unshifted: whether the logits at a token are compared with this token, not the next one; see generation.score.
        rated_offset: rounds from the one that people rated to the one whose scores NDCG takes.
        framing: how the image becomes the tower's input.
    """

    prompt: Callable[[Dialogue, int, Tensor], list[Part]]
    candidate: str
    unshifted: bool
    rated_offset: int
    framing: Framing

    def scores(self, model: Fromage, dialogue: Dialogue, number: int, features: Tensor) -> Tensor:
        """(C,) of a round's candidates, in nats; features (m,)."""
        texts = [self.candidate.format(text) for text in dialogue.rounds[number].candidates]
        return score(model, self.prompt(dialogue, number, features), texts, self.unshifted).total


def our_prompt(dialogue: Dialogue, number: int, features: Tensor) -> list[Part]:
    """The image, </s>, the rounds before on one line, and the question as far as 'A:'."""
    before = spoken(dialogue.rounds[:number])
    return [features, START, f"{before} Q: {dialogue.rounds[number].question} A:".strip()]


def authors_prompt(dialogue: Dialogue, number: int, features: Tensor) -> list[Part]:
    """The released code's: a line for each question and each answer, and </s> in front of the candidate."""
    lines = [f"Q: {turn.question}\nA: {turn.answer}\n" for turn in dialogue.rounds[:number]]
    return [features, START, "".join(lines) + f"Q: {dialogue.rounds[number].question}\nA: ", START]


ANSWER_PROTOCOLS = {
    "answers": AnswerProtocol(our_prompt, " {}.", unshifted=False, rated_offset=0, framing="own"),
    # the released code counts rounds from 0 where the file counts from 1, so its NDCG is of the round after the rated one
    "answers_authors": AnswerProtocol(authors_prompt, "{}", unshifted=True, rated_offset=1, framing="square"),
}
PROTOCOL = {
    "answers": "log-likelihood of ' candidate.' after image, </s>, rounds as 'Q: ...? A: ....' and 'Q: ...? A:'",
    "answers_authors": "the released code's: image pressed into the tower's square, whatever its shape; rounds as lines; "
    "</s> in front of the candidate; logits at a token compared with this very token; and NDCG of the round that follows "
    "the rated one",
    "N_rounds": "the image of a dialogue among all, by 'Q: ...? A: ....' of its first N rounds and [RET], without caption",
    "N_rounds_authors": "the released code's way round: the dialogue of an image among all; images pressed into the tower's "
    "square, whatever their shape, those of CLIP too",
    "images": "as the tower takes them, resized and cropped in the middle, but for ..._authors",
    "clip": "the rounds as one text, cut at the length of its context (OpenAI's: 77 tokens)",
    "ranks": "exact; ties count against the model; in NDCG they share their places' gain",
}
HEADLINE = (*ANSWER_PROTOCOLS, "1_rounds", "5_rounds", "10_rounds", "10_rounds_authors")
PUBLISHED = 2064  # dialogues of the published file, by which it is known
PAPER = {
    "fromage": {
        "answers_authors": {"ndcg": 16.6, "mrr": 22.0, "r1": 17.6, "r5": 20.0, "r10": 24.4},
        "10_rounds_authors": {"r1": 20.8, "r5": 44.9, "r10": 56.0},
    },
    "clip": {"10_rounds_authors": {"r1": 17.7, "r5": 38.9, "r10": 50.2}},
}


# --- the evaluation --------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: Fromage, data: Dialogues, options: Options | None = None, answers: bool = True, scores: Path | None = None
) -> Report:
    """Both tasks in both protocols: answers ranked, and images found with 0 to all rounds, beside CLIP and chance.

    answers: whether answers are ranked, which takes longest. scores: a folder to resume that from, see score_answers.
    Raises UserError for too many images lost, and as score_answers does.
    """
    framings: tuple[Framing, ...] = ("own", "square")
    run = ContextualRun(model, data.name, [dialogue.image for dialogue in data.dialogues], options, framings)
    dialogues = run.keep(data.dialogues, lambda dialogue: [dialogue.image])
    views = {how: run.encoded.of([dialogue.image for dialogue in dialogues], how) for how in framings}  # (D, m) each

    figures = run.evaluate(image_tasks(dialogues))
    if answers:
        scored = score_answers(model, dialogues, views, scores)
        ranked = {name: answer_figures(scored[name], dialogues, ANSWER_PROTOCOLS[name].rated_offset) for name in scored}
        figures["fromage"] = ranked | figures["fromage"]
        figures["chance"] |= dict.fromkeys(ranked, chance_figures(dialogues))
    sizes = {"gallery": len(dialogues), "queries": len(dialogues), "candidates": len(dialogues[0].rounds[0].candidates)}
    skipped = {"dialogues with a lost image": len(data.dialogues) - len(dialogues)}
    paper = PAPER if len(dialogues) == PUBLISHED else {}
    return run.report("visdial", figures, sizes, skipped, PROTOCOL, paper, HEADLINE)


def image_tasks(dialogues: Sequence[Dialogue]) -> dict[str, RetrievalTask]:
    """Find the image of a dialogue by 0 to all of its rounds; and, as the released code does, the dialogue of an image."""
    images = [dialogue.image for dialogue in dialogues]
    own, square = Side("images", images), Side("images", images, "square")
    right = [[number] for number in range(len(dialogues))]
    tasks, turned = {}, {}
    for n in range(len(dialogues[0].rounds) + 1):
        said = [spoken(dialogue.rounds[:n]) for dialogue in dialogues]
        rounds = Side(f"{n} rounds", [Query([text], text) for text in said])
        tasks[f"{n}_rounds"] = RetrievalTask(rounds, own, right)
        turned[f"{n}_rounds{AUTHORS}"] = RetrievalTask(square, rounds, right)
    return tasks | turned


def score_answers(
    model: Fromage, dialogues: Sequence[Dialogue], views: Mapping[Framing, Tensor], folder: Path | None = None
) -> dict[str, Tensor]:
    """(D, R, C) scores of C candidates in R rounds of D dialogues, by protocol; views: features (D, m) by framing.

    folder: where each dialogue's scores are kept; what is there already, from a run that was killed, is not computed again.
    Raises UserError for a folder with scores of another model or of other dialogues, and where another process writes it.
    """
    about = identity(model, dialogues, {name: how.framing for name, how in ANSWER_PROTOCOLS.items()})
    with nullcontext() if folder is None else held(folder):
        store = ScoreStore(folder, about)
        rows = [
            store.get(number)
            if number in store
            else store.put(number, dialogue_scores(model, dialogue, {how: views[how][number] for how in views}))
            for number, dialogue in enumerate(tqdm(dialogues, desc="ranking answers", unit="dialogue"))
        ]  # (2, R, C) each
    return dict(zip(ANSWER_PROTOCOLS, torch.from_numpy(np.stack(rows, 1)), strict=True))


def dialogue_scores(model: Fromage, dialogue: Dialogue, views: Mapping[Framing, Tensor]) -> np.ndarray:
    """(2, R, C) scores of one dialogue's candidates in nats, of each protocol; views: features (m,) by framing."""
    rounds, protocols = range(len(dialogue.rounds)), ANSWER_PROTOCOLS.values()
    scored = [how.scores(model, dialogue, number, views[how.framing]) for how in protocols for number in rounds]
    both = torch.stack(scored).unflatten(0, (len(protocols), len(rounds)))  # (2 R, C) -> (2, R, C)
    return both.float().cpu().numpy()


# --- figures of answers ----------------------------------------------------------------------------------------------


def answer_figures(scores: Tensor, dialogues: Sequence[Dialogue], rated_offset: int = 0) -> Figures:
    """NDCG over the rated rounds; MRR, recalls and mean rank over all; scores (D, R, C). All but the rank in percent.

    rated_offset: see AnswerProtocol. After a dialogue's last round comes the next one's first; after the last, none.
    """
    flat = scores.flatten(0, 1)  # (D, R, C) -> (D R, C)
    right = torch.tensor([turn.right for dialogue in dialogues for turn in dialogue.rounds])  # (D R,)
    rank = ranks_among(flat, torch.arange(scores.shape[2]) == right.unsqueeze(1))  # (D R,)
    places = [number * scores.shape[1] + dialogue.rated + rated_offset for number, dialogue in enumerate(dialogues)]
    inside = [i for i, place in enumerate(places) if place < len(flat)]
    relevance = torch.tensor([dialogues[i].relevance for i in inside], dtype=torch.float32)  # (D, C)
    figures = {"ndcg": ndcg(flat[[places[i] for i in inside]], relevance)} if inside else {}
    return figures | {"mrr": mean_reciprocal_rank(rank), **recall_at(rank), "mean_rank": rank.float().mean().item()}


def chance_figures(dialogues: Sequence[Dialogue]) -> Figures:
    """What answer_figures gives for a random order, in expectation."""
    count = len(dialogues[0].rounds[0].candidates)
    discount = 1 / torch.arange(2.0, count + 2, dtype=torch.float64).log2()  # (C,)
    gains = []
    for dialogue in dialogues:
        best = torch.tensor(sorted(dialogue.relevance, reverse=True), dtype=torch.float64)  # (C,)
        places = slice(int((best > 0).sum()))
        gains.append((best.mean() * discount[places].sum() / (best * discount)[places].sum()).nan_to_num().item())
    recalls = {f"r{k}": 100 * min(1, k / count) for k in (1, 5, 10)}
    reciprocal = sum(1 / rank for rank in range(1, count + 1)) / count
    return {"ndcg": 100 * sum(gains) / len(gains), "mrr": 100 * reciprocal, **recalls, "mean_rank": (count + 1) / 2}
