"""Answers to questions about images, for the official scorers of VQAv2, OK-VQA, GQA, VizWiz, ScienceQA and others.

Protocol: greedy answers, written as LLaVA's model_vqa_loader writes them: question_id, prompt, text, answer_id, model_id,
metadata. VQA accuracy where annotations are given; see fromage.evals.vqa.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fromage.checkpoints.format import OCTOPUS
from fromage.errors import UserError, first_few
from fromage.evals.answer_file import AnswerFile
from fromage.evals.base import made_by, make_report, quantized
from fromage.evals.options import Options
from fromage.evals.predict import SECONDS, ImageStream
from fromage.evals.questions import Question, Questions
from fromage.evals.report import Figures, Report, System
from fromage.evals.vqa import HumanAnswers, accuracy
from fromage.generation.generate import generate
from fromage.generation.options import Decoding
from fromage.models.fromage import Fromage
from fromage.models.pretrained import Pretrained
from fromage.models.prompts import ImageInput, Part, prompt_length
from fromage.octopus.decoding import MAX_NEW_TOKENS, ground
from fromage.octopus.model import Octopus

Asked = Sequence[tuple[Tensor | None, str]]  # features of an image, or none, and a question

PROTOCOL = {
    "answers": "greedy, of at most {length} tokens",
    "words": "in an answer, on average",
    "accuracy": "VQA's, against ten people's answers, in percent; all, and by the kind of answer that the annotations name",
}
FROMAGE_PROMPT = "Q: {}\nA:"  # as in its chats
FORMAT = 1  # of the prompts; another one where their words change


@singledispatch
def answer(model: Pretrained, asked: Asked, max_new_tokens: int) -> list[str]:
    """Greedy answers in words, of any kind of model."""
    raise NotImplementedError(type(model))


@answer.register
def _(model: Octopus, asked: Asked, max_new_tokens: int) -> list[str]:
    return [found.words for found in ground(model, asked, max_new_tokens, len(asked))]


@answer.register
def _(model: Fromage, asked: Asked, max_new_tokens: int) -> list[str]:
    prompts = [prompt_of(model, *each) for each in asked]
    found = generate(model, prompts, Decoding(max_new_tokens, stop=("\n",), max_images=0), batch_size=len(asked))
    return [each.text for each in found]


@singledispatch
def prompt_of(model: Pretrained, image: ImageInput | None, text: str) -> list[Part]:
    """What a question becomes, of any kind of model."""
    raise NotImplementedError(type(model))


@prompt_of.register
def _(model: Octopus, image: ImageInput | None, text: str) -> list[Part]:
    return model.prompt(image, text, ask=image is not None)


@prompt_of.register
def _(model: Fromage, image: ImageInput | None, text: str) -> list[Part]:
    return [*([] if image is None else [image]), FROMAGE_PROMPT.format(text)]


def too_long(model: Pretrained, questions: Sequence[Question], max_new_tokens: int) -> set[int | str]:
    """The keys of questions that, with an answer, have more tokens than the language model takes; warns of them."""
    if (limit := model.lm.max_length) is None:
        return set()
    lengths = {q.key: prompt_length(model, prompt_of(model, q.image, q.asked)) + max_new_tokens for q in questions}
    found = {key for key, length in lengths.items() if length > limit}
    if found:
        some = first_few([str(key) for key in lengths if key in found])
        told = f"{model.lm.name} takes {limit} tokens, answer included; {len(found)} questions are longer ({some})"
        warnings.warn(f"{told}, and left out", stacklevel=3)
    return found


def evaluate(
    model: Pretrained,
    data: Questions,
    out: Path,
    options: Options | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    annotations: Mapping[int | str, HumanAnswers] | None = None,
    model_id: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Answer questions into the file `out`, and report; what a killed run of the same answered is not answered again.

    model_id: name of the model in the file (default: its kind and fingerprint). overwrite: begin again, and replace `out`.
    Raises UserError for a file that is there, an unfinished one of another model, of other questions, images or another
    length, for too many images lost, and for annotations of other questions.
    """
    options = options or Options()
    known = _known(data.questions, annotations or {})
    if annotations is not None and not known:
        raise UserError(f"{data.file}: none of its questions is in the annotations; name those of the same split")
    kind = "sequential" if model.kind == OCTOPUS and not model.num_queries else model.kind
    made = made_by(model, [question.image for question in data.questions if question.image])
    name = model_id or "-".join([kind, made["checkpoint"], *quantized(model).values()])
    about = {"questions": digest_of(data.questions), **made, "length": max_new_tokens, "prompts": FORMAT, "model_id": name}
    with AnswerFile(out, about, overwrite) as file:
        long = too_long(model, data.questions, max_new_tokens)
        todo = [question for question in data.questions if question.key not in file.answered.keys() | long]
        whole = len({question.image for question in data.questions if question.image})
        stream = ImageStream(model, [question.image for question in todo], options, whole)
        start = perf_counter()
        for numbers, images in tqdm(stream, "answering", len(stream.batches), unit="batch", leave=False):
            asked = [(image, todo[i].asked) for i, image in zip(numbers, images, strict=True)]
            said = answer(model, asked, max_new_tokens) if asked else []
            file.add([_record(todo[i], text, name) for i, text in zip(numbers, said, strict=True)])
        seconds = perf_counter() - start
        if not file.answered:
            told = "name the right --images" + ", or a smaller --max-new-tokens" * bool(long)
            raise UserError(f"{data.file}: no question has its image{' and is short enough' if long else ''}; {told}")
        file.finish(question.key for question in data.questions)
    texts = {key: record["text"] for key, record in file.answered.items()}
    lost = sum(question.key not in texts for question in todo)
    figures: System = {"all": {"words": sum(len(text.split()) for text in texts.values()) / len(texts)}}
    if len(todo) > lost:
        figures["all"]["seconds"] = seconds / (len(todo) - lost)
    figures |= _accuracies(figures["all"], texts, known)
    before = len(data.questions) - len(long) - len(todo)
    sizes = {"questions": len(data.questions), "answers": len(texts), "answered_before": before}
    sizes |= {"images": len(stream.images)} | ({"annotated": len(known)} if annotations is not None else {})
    protocol = {**PROTOCOL, "answers": PROTOCOL["answers"].format(length=max_new_tokens)}
    protocol["seconds"] = SECONDS.format(device=model.device, batch_size=options.batch_size)
    skipped = {"odd entries": data.odd, "questions with a lost image": lost}
    skipped |= {"questions too long": len(long)} if long else {}
    return make_report(model, "answers", data.file.name, {kind: figures}, sizes, skipped, protocol, stream.lost)


def digest_of(questions: Sequence[Question]) -> str:
    """16 hex digits of questions in their order, with the names of their images."""
    listed = [(key, image.name if image else None, text) for key, image, text in questions]
    return hashlib.sha256(repr(listed).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _record(question: Question, text: str, model_id: str) -> dict[str, Any]:
    """A line of the file. The answer_id of the same answer by the same model is always the same."""
    answer_id = hashlib.sha256(repr((model_id, question.key, question.text, text)).encode()).hexdigest()[:22]
    record = {"question_id": question.key, "prompt": question.text, "text": text, "answer_id": answer_id}
    return record | {"model_id": model_id, "metadata": {}}


def _known(questions: Sequence[Question], annotations: Mapping[int | str, HumanAnswers]) -> dict[int | str, HumanAnswers]:
    """What people answered, by question: found under its id, or its image's name."""
    found: dict[int | str, HumanAnswers] = {}
    for question in questions:
        note = annotations.get(question.key) or (question.image and annotations.get(question.image.name))
        found |= {question.key: note} if note else {}
    return found


def _accuracies(first: Figures, texts: Mapping[int | str, str], annotations: Mapping[int | str, HumanAnswers]) -> System:
    """VQA accuracy in percent, of all annotated answers, beside the figures of `first`, and by kind of answer."""
    found: dict[str, list[float]] = defaultdict(list)
    for key, text in texts.items():
        if key in annotations:
            value = accuracy(text, annotations[key].answers)
            found["all"].append(value)
            found[annotations[key].kind or "all"] += [value] if annotations[key].kind else []
    means = {kind: {"accuracy": 100 * sum(values) / len(values)} for kind, values in found.items()}
    return means | {"all": means.get("all", {}) | first}
