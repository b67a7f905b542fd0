"""Generated captions compared with those of people: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr, by COCO's own programs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from fromage.distribution import pip_install
from fromage.errors import UserError


def check_installed() -> None:
    """Raise UserError where pycocoevalcap or Java, in which two of its programs are written, is not installed."""
    try:
        import pycocoevalcap.bleu.bleu  # noqa: F401
    except ImportError as error:
        raise UserError(f"captions are measured by pycocoevalcap: {pip_install('evals')}, or leave them out") from error
    if shutil.which("java") is None:
        raise UserError("captions are measured by programs in Java: install a Java runtime, or leave them out")


def caption_figures(made: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """bleu1 to bleu4, meteor, rouge_l and cider, each in percent, of one caption and some references for each image.

    Raises UserError as check_installed does.
    """
    check_installed()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    wanted, given = (  # the tokenizer pairs texts with lines, of which a line break of any kind begins another
        PTBTokenizer().tokenize(
            {i: [{"caption": " ".join(text.split())} for text in texts] for i, texts in enumerate(listed)}
        )
        for listed in (references, [[text] for text in made])
    )
    figures: dict[str, float] = {}
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # its scorers print as they count
        for name, scorer in (("bleu", Bleu(4)), ("meteor", Meteor()), ("rouge_l", Rouge()), ("cider", Cider())):
            score = scorer.compute_score(wanted, given)[0]
            named = {f"bleu{n}": value for n, value in enumerate(score, 1)} if name == "bleu" else {name: score}
            figures |= {key: 100 * float(value) for key, value in named.items()}
    return figures
