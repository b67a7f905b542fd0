"""Instructions as LLaVA writes them: answers that point at one or several objects, and answers in text alone."""

from __future__ import annotations

from typing import Any

from fromage.evals.predict import ask
from fromage.octopus.examples import Example
from fromage.octopus.metrics import averaged, judge
from fromage.octopus.model import Octopus
from fromage.octopus.sources import Instructions
from fromage.retrieval.encode import Options

PROTOCOL = {
    "all_found": "as many boxes as there ought to be, and each the partner of one of these with an IoU from 0.5 on",
    "words": "whether the answer's words, boxes left out, are exactly those of the data",
}


def evaluate(model: Octopus, data: Instructions, options: Options | None = None) -> dict[str, Any]:
    """Figures by the number of objects that the right answer points at. Raises UserError as ask does."""
    asked = ask(model, data, options or Options())
    judged: dict[str, list[dict[str, float]]] = {}
    for example, answer in sorted(asked.answered, key=lambda pair: len(pair[0].meant)):
        words = " ".join(piece for piece in example.answer if isinstance(piece, str))
        wanted = [example.boxes[piece] for piece in example.answer if isinstance(piece, int)]
        figures = {name: value for name, value in judge(answer, wanted, words).items() if name in PROTOCOL}
        judged.setdefault(setting(example), []).append(figures)
    system = {name: averaged(figures) for name, figures in judged.items()}
    counts = {f"answers_{name}": len(figures) for name, figures in judged.items()}
    return asked.report("instructions", system, PROTOCOL, sizes=counts)


def setting(example: Example) -> str:
    """'text', '1_object', '2_objects' ..."""
    many = len(example.meant)
    return f"{many}_object{'s' if many > 1 else ''}" if many else "text"
