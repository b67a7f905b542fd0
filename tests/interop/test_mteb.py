"""mteb's own runner on tasks of six images: its scores are those of our own ranks."""

import importlib
import json
import sys

import mteb
import pytest
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from PIL import Image

from fromage.cli.main import main
from fromage.errors import UserError
from fromage.interop.mteb import FromageMteb, evaluate, find_tasks, items
from fromage.retrieval.queries import embed_queries

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
TEXTS = [f"a {colour} thing" for colour in COLOURS]


def task(category, queries, corpus, wanted):
    """A task of mteb: query i seeks document wanted[i]."""
    about = {
        "name": f"Colours{category.upper()}",
        "category": category,
        "description": "Six colours.",
        "type": "Any2AnyRetrieval",
    }
    about |= {"modalities": sorted({*queries, *corpus}), "eval_splits": ["test"], "eval_langs": ["eng-Latn"]}

    class Tiny(AbsTaskRetrieval):
        metadata = TaskMetadata(**about, main_score="recall_at_1", dataset={"path": "none", "revision": "1"})

        def load_data(self, **options):
            made = {letter: Dataset.from_dict({"id": [f"{letter}{i}" for i in range(6)]} | what)
                    for letter, what in (("q", queries), ("d", corpus))}  # fmt: skip
            relevant = {f"q{i}": {f"d{number}": 1} for i, number in enumerate(wanted)}
            split = RetrievalSplitData(queries=made["q"], corpus=made["d"], relevant_docs=relevant, top_ranked=None)
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Tiny()


def sought(model, queries, corpus, right):
    """Documents of which the first `right` are what the model finds first, and the others what it finds last."""
    scores = embed_queries(model, queries) @ embed_queries(model, corpus).T  # (6, 6)
    return [*scores.argmax(1)[:right].tolist(), *scores.argmin(1)[right:].tolist()]


@pytest.fixture
def images(folder):
    return [Image.open(folder / f"{colour}.png") for colour in COLOURS]


@pytest.fixture
def tasks(model, images):
    both, others = [[image, text] for image, text in zip(images, TEXTS, strict=True)], [f"{text}." for text in TEXTS]
    return [
        task("t2i", {"text": TEXTS}, {"image": images}, sought(model, TEXTS, images, 4)),
        task("i2t", {"image": images}, {"text": TEXTS}, sought(model, images, TEXTS, 3)),
        task("it2i", {"image": images, "text": TEXTS}, {"image": images}, sought(model, both, images, 2)),
        task("t2t", {"text": TEXTS}, {"text": others}, sought(model, TEXTS, others, 5)),
    ]


def test_tasks_over_texts_images_and_both(model, tasks):
    report = evaluate(model, tasks, batch_size=4)
    names = [one.metadata.name for one in tasks]
    assert [report["main_scores"][name] for name in names] == pytest.approx([4 / 6, 3 / 6, 2 / 6, 5 / 6], abs=1e-5)
    (scores,) = report["scores"]["ColoursIT2I"]["test"]
    assert scores["mrr_at_10"] == pytest.approx((2 + 4 / 6) / 6, abs=1e-5), "the first, or the last of six"
    assert [row[0] for row in report["table"]["rows"]] == sorted(names) and json.dumps(report)
    assert report["checkpoint"] == model.fingerprint()


def test_their_runner_takes_the_encoder_as_it_is(model, tasks):
    results = mteb.evaluate(FromageMteb(model), tasks[:1], cache=None)
    assert results.model_name == f"fromage/{model.fingerprint()}" and len(results.task_results) == 1


def test_items_may_lack_one_of_the_two_and_other_batches_are_refused(images):
    assert items({"image": [images[0], None], "text": ["a", "b"]}) == [[images[0], "a"], ["b"]]
    assert items({"text": ["a"], "id": ["q1"]}) == [["a"]]
    with pytest.raises(UserError, match="audio"):
        items({"audio": [1]})


def test_the_command_prints_their_table(model, tasks, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "model", "float32")
    by_name = {one.metadata.name: one for one in tasks}
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [by_name[name] for name in tasks])
    words = ["eval", "mteb", "--ckpt", str(tmp_path / "model"), "--tasks", "ColoursT2I", "--tasks", "ColoursI2T"]
    assert main([*words, "--json", str(tmp_path / "report.json"), "--device", "cpu"]) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    assert "ColoursT2I" in printed and "ColoursI2T" in printed and model.fingerprint() in printed
    assert f"{report['main_scores']['ColoursT2I']:.4f}" in printed


def test_what_is_wrong_is_one_line(model, tasks, tmp_path, monkeypatch, capsys):
    assert main(["eval", "mteb", "--ckpt", "a/b", "--tasks", "Flicker30kT2IRetrieval"]) == 2
    assert "Flicker30kT2IRetrieval" in (told := capsys.readouterr().err) and told.count("\n") == 1
    assert main(["eval", "mteb", "--ckpt", "a/b"]) == 2 and "tasks" in capsys.readouterr().err
    with pytest.raises(UserError, match="text and images alone"):
        find_tasks([mteb.get_tasks(modalities=["audio"])[0].metadata.name])
    monkeypatch.setattr(tasks[0], "load_data", lambda: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(UserError, match=r"ColoursT2I: its data cannot be had \(no route\)"):
        evaluate(model, tasks[:1])


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.delitem(sys.modules, "fromage.interop.mteb", raising=False)
    with pytest.raises(UserError, match=r"pip install '\.\[mteb\]'"):
        importlib.import_module("fromage.interop.mteb")
