"""Answers to questions about an image: scores of all candidates, kept on disk as they are made."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fromage.errors import UserError, first_line
from fromage.evals.dialogues import Dialogue, spoken
from fromage.generation.score import score
from fromage.identity import FolderKind
from fromage.io import write_files
from fromage.models.fromage import Fromage
from fromage.models.prompts import START, Part
from fromage.retrieval.metrics import mean_reciprocal_rank, ndcg, ranks_among, recall_at

PROTOCOLS = ("answers", "answers_authors")  # what scores are of, in order


def score_answers(
    model: Fromage, dialogues: Sequence[Dialogue], features: Tensor, folder: Path | None = None
) -> dict[str, Tensor]:
    """(D, R, C) scores of C candidates in R rounds of D dialogues, by protocol; features (D, m) of the images.

    folder: where each dialogue's scores are kept; what is there already, from a run that was killed, is not computed anew.
    Raises UserError for a folder with scores of another model or of other dialogues.
    """
    kept = Scores(folder, _about(model, dialogues))
    rows = [
        kept.get(number) if number in kept else kept.put(number, dialogue_scores(model, talk, own))
        for number, (talk, own) in enumerate(
            zip(tqdm(dialogues, desc="ranking answers", unit="dialogue"), features, strict=True)
        )
    ]
    return dict(zip(PROTOCOLS, torch.from_numpy(np.stack(rows, 1)), strict=True))


def dialogue_scores(model: Fromage, talk: Dialogue, features: Tensor) -> np.ndarray:
    """(2, R, C): log-likelihoods of one dialogue's candidates, and what the released code ranks by."""
    rounds = [
        [
            score(model, prompt(talk, number, features), [f" {text}." for text in said.candidates]).total,
            score(model, authors_prompt(talk, number, features), said.candidates, unshifted=True).total,
        ]
        for number, said in enumerate(talk.rounds)
    ]
    return torch.stack([torch.stack(both) for both in rounds], 1).float().cpu().numpy()


def prompt(talk: Dialogue, number: int, features: Tensor) -> list[Part]:
    """The image, the rounds before and the question, as far as 'A:'."""
    before = spoken(talk.rounds[:number])
    return [features, START, f"{before} Q: {talk.rounds[number].question} A:".strip()]


def authors_prompt(talk: Dialogue, number: int, features: Tensor) -> list[Part]:
    """As the released code has it: a line for each question and each answer, and </s> in front of the candidate."""
    lines = [f"Q: {said.question}\nA: {said.answer}\n" for said in talk.rounds[:number]]
    return [features, START, "".join(lines) + f"Q: {talk.rounds[number].question}\nA: ", START]


def answer_figures(scores: Tensor, dialogues: Sequence[Dialogue], authors: bool = False) -> dict[str, float]:
    """NDCG over the rated rounds; MRR, recalls and mean rank over all; scores (D, R, C).

    authors: take the scores of the round behind the rated one for NDCG, as the released code does, which counts rounds
    from 0 where the file counts from 1; and of the next dialogue's first round behind the last one.
    """
    flat = scores.flatten(0, 1)  # (D R, C)
    right = torch.tensor([said.right for talk in dialogues for said in talk.rounds])  # (D R,)
    rank = ranks_among(flat, torch.arange(scores.shape[2]) == right.unsqueeze(1))
    places = [number * scores.shape[1] + talk.rated + authors for number, talk in enumerate(dialogues)]
    inside = [i for i, place in enumerate(places) if place < len(flat)]
    relevance = torch.tensor([dialogues[i].relevance for i in inside], dtype=torch.float32)  # (D, C)
    figures = {"ndcg": ndcg(flat[[places[i] for i in inside]], relevance)} if inside else {}
    return figures | {"mrr": mean_reciprocal_rank(rank), **recall_at(rank), "mean_rank": rank.float().mean().item()}


def chance_figures(dialogues: Sequence[Dialogue]) -> dict[str, float]:
    """The same of a random order, in expectation."""
    count = len(dialogues[0].rounds[0].candidates)
    gains = []
    for talk in dialogues:
        best = torch.tensor(sorted(talk.relevance, reverse=True), dtype=torch.float64)
        discount = 1 / torch.arange(2.0, count + 2, dtype=torch.float64).log2()
        places = slice(int((best > 0).sum()))
        gains.append((best.mean() * discount[places].sum() / (best * discount)[places].sum()).nan_to_num().item())
    recalls = {f"r{k}": 100 * min(1, k / count) for k in (1, 5, 10)}
    reciprocal = sum(1 / rank for rank in range(1, count + 1)) / count
    return {"ndcg": 100 * sum(gains) / len(gains), "mrr": 100 * reciprocal, **recalls, "mean_rank": (count + 1) / 2}


# --- scores on disk -------------------------------------------------------------------------------------------------


def _about(model: Fromage, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """What scores belong to."""
    digest = hashlib.sha256(repr([(talk.image.name, talk.rounds) for talk in dialogues]).encode()).hexdigest()[:16]
    return {"checkpoint": model.fingerprint(), "dialogues": digest, "protocols": list(PROTOCOLS)}


SCORES = FolderKind(
    "about.json",
    "scores",
    of="checkpoint, or of other dialogues",
    remedy="name another --scores",
    again="remove it and run it again",
)


class Scores:
    """One file for each dialogue, 000000.npy and on, beside about.json; in memory only where there is no folder."""

    def __init__(self, folder: Path | None, about: dict[str, Any]) -> None:
        self.folder = folder
        if folder is not None:
            SCORES.begin(folder, about)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:06d}.npy"

    def __contains__(self, number: int) -> bool:
        return self.folder is not None and self._path(number).is_file()

    def get(self, number: int) -> np.ndarray:
        """Scores that are there. Raises UserError for a file that is damaged."""
        path = self._path(number)
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: is damaged ({first_line(error)}); remove it and run it again") from error

    def put(self, number: int, scores: np.ndarray) -> np.ndarray:
        """Keep scores, under their name only when whole; returns them."""
        if self.folder is not None:
            file = io.BytesIO()
            np.save(file, scores)
            write_files(self.folder, {self._path(number).name: file.getvalue()})
        return scores
