"""lmms-eval's runner on tasks of six images; without lmms-eval, its documented requests on a stand-in of its base class."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from fromage.errors import UserError
from fromage.generation.generate import generate
from fromage.generation.options import Decoding
from fromage.generation.score import score
from fromage.interop.lmms_eval_manifest import CLASS, MODEL
from fromage.models.prompts import prompt_length

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
HERE = importlib.util.find_spec("lmms_eval") is not None


class Base:
    """What lmms_eval.api.model.lmms is to a model."""

    def __init__(self):
        self.task_dict, self.cached = {}, []
        self.cache_hook = SimpleNamespace(add_partial=lambda *told: self.cached.append(told))


@pytest.fixture
def adapter(monkeypatch):
    """The module of the class; where lmms-eval is not installed its base class is a stand-in."""
    if not HERE:
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["lmms_eval.api.model"].lmms = Base
    monkeypatch.delitem(sys.modules, "fromage.interop.lmms_eval", raising=False)
    return importlib.import_module("fromage.interop.lmms_eval")


@pytest.fixture
def docs():
    return [{"image": Image.new("RGB", (32, 32), colour), "question": f"is it {colour}?"} for colour in COLOURS]


@pytest.fixture
def lm(adapter, toy_model, docs, tmp_path):
    """The model of a saved folder, with the documents of a task."""
    toy_model.save_pretrained(tmp_path / "model", "float32")
    made = adapter.FromageLmms(str(tmp_path / "model"), device="cpu", batch_size="4", max_batch_size=8, style="plain")
    made.task_dict = {"colours": {"test": docs}}
    return made


def image_of(doc):
    return [doc["image"]]


def asked(number, options, context="is it red?", visual=image_of):
    return SimpleNamespace(args=(context, options, visual, number, "colours", "test"))


def test_answers_are_those_of_generate_in_the_order_of_the_requests(lm, docs):
    """Options alternate, so that requests of two groups lie between each other; batches are smaller than the groups."""
    options = [{"max_new_tokens": 4, "do_sample": False, "temperature": 0.7}, {"max_new_tokens": 6, "until": ["\n", "zz"]}]
    requests = [asked(i % 6, options[i % 2], f"question {i}") for i in range(12)]
    found = lm.generate_until(requests)
    for i, text in enumerate(found):
        decoding = Decoding((4, 6)[i % 2], stop=(*lm.style.stop, *((), ("zz",))[i % 2]), max_images=0)
        (alone,) = generate(lm.model, [lm.style.prompt([], [], [docs[i % 6]["image"], f"question {i}"])], decoding)
        assert text == alone.text
    assert len(set(found)) > 1


def test_images_stand_where_the_context_says_or_in_front(adapter, docs):
    red, blue = docs[0]["image"], docs[2]["image"]
    placed = lambda context, *images: list(adapter._placed(context, images))  # noqa: E731
    assert placed("is <image> like <image>?", red, blue) == ["is ", red, " like ", blue, "?"]
    assert placed("<image>\nwhat is it?", red) == [red, "\nwhat is it?"]
    assert placed("what is it?", red, blue) == [red, blue, "what is it?"]
    assert placed("<image> and <image>?", red) == [red, "and ?"] and placed("no image") == ["no image"]


def test_options_of_a_task_become_ours(lm):
    made = lm._decoding({"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "until": "\n\n", "num_beams": 1})
    assert made == Decoding(9, temperature=0.5, top_p=0.9, top_k=3, stop=(*lm.style.stop, "\n\n"), max_images=0)
    greedy = lm._decoding({"temperature": 1.0, "top_p": 0.9, "do_sample": False})
    assert greedy.temperature == 0 and greedy.top_p == 1 and greedy.max_new_tokens == 128
    with pytest.raises(UserError, match="num_beams 5"):
        lm._decoding({"num_beams": 5})


def test_an_answer_is_cut_to_the_positions_that_are_left(lm):
    (long,) = lm.generate_until([asked(0, {"max_new_tokens": 100_000})])
    assert isinstance(long, str)


def test_an_answer_is_the_same_beside_prompts_that_leave_little_room_or_none(lm):
    """A long prompt cuts its own answer alone; one that fills the language model is answered by nothing."""
    options = {"max_new_tokens": 12}
    beside = lm.model.tokenizer.encode(" red")
    base = prompt_length(lm.model, lm._prompt(asked(0, options, "").args))
    contexts = ["is it red?", " red" * ((lm.model.lm.max_length - base - 3) // len(beside)), "a red star " * 500]
    requests = [asked(i, options, context) for i, context in enumerate(contexts)]
    alone = [*lm.generate_until(requests[:1]), *lm.generate_until(requests[1:2]), ""]
    with pytest.warns(UserWarning, match="colours: 1 prompts leave no room for an answer in the 512 of the language model"):
        assert lm.generate_until(requests) == alone
    assert alone[0] and len(lm.model.tokenizer.encode(alone[0])) > len(lm.model.tokenizer.encode(alone[1]))


def test_log_likelihoods_are_ours_and_greedy_is_what_is_generated(lm, docs):
    prompt = lm.style.prompt([], [], [docs[1]["image"], "it is"])
    (greedy,) = generate(lm.model, [prompt], Decoding(3, max_images=0))
    said = lm.model.tokenizer.decode(greedy.ids)
    wanted = [" red", said, lambda doc: f" {doc['question']}"]
    found = lm.loglikelihood([asked(1, text, "it is") for text in wanted])
    totals = score(lm.model, prompt, [" red", said, " is it green?"]).total.tolist()
    assert [total for total, _ in found] == pytest.approx(totals, abs=1e-5)
    assert [is_greedy for _, is_greedy in found][1:] == [lm.model.tokenizer.encode(said) == greedy.ids, False]


def test_what_it_cannot_do_is_one_line(lm, adapter, tmp_path):
    with pytest.raises(UserError, match="shows str; FROMAGe reads images"):
        lm.generate_until([asked(0, {}, visual=lambda doc: ["film.mp4"])])
    with pytest.raises(UserError, match="several rounds"):
        lm.generate_until_multi_round([])
    with pytest.raises(UserError, match="batch_size auto"):
        adapter.FromageLmms(str(tmp_path / "model"), batch_size="auto")


@pytest.mark.skipif(HERE, reason="lmms-eval is installed")
def test_without_lmms_eval_one_line_names_the_extra():
    sys.modules.pop("fromage.interop.lmms_eval", None)
    with pytest.raises(UserError, match=r"lmms-eval.*\[lmms-eval\]"):
        importlib.import_module("fromage.interop.lmms_eval")


@pytest.mark.skipif(not HERE, reason="needs lmms-eval and its many libraries: extra [lmms-eval]")
def test_its_own_runner_scores_a_task(toy_model, tmp_path, monkeypatch, docs):
    """The registry finds the model by its name, and the runner's accuracy is that of the answers."""
    from datasets import Dataset, DatasetDict
    from lmms_eval import models
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from fromage.interop.lmms_eval_manifest import manifest

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert f"{registry.get_model_class(MODEL).__module__}.{registry.get_model_class(MODEL).__name__}" == CLASS
    monkeypatch.setattr(models, "MODEL_REGISTRY_V2", registry)
    toy_model.save_pretrained(tmp_path / "model", "float32")
    lm = models.get_model(MODEL).create_from_arg_string(
        f"pretrained={tmp_path / 'model'},style=plain", {"batch_size": 4, "device": "cpu"}
    )
    expected = ["", *(f"never said {i}" for i in range(5))]
    rows = Dataset.from_dict({"question": [doc["question"] for doc in docs], "answer": expected})
    monkeypatch.setattr(ConfigurableTask, "download", lambda self, *_, **__: None)
    monkeypatch.setattr(ConfigurableTask, "dataset", DatasetDict({"test": rows}), raising=False)
    monkeypatch.setattr(ConfigurableTask, "dataset_no_image", DatasetDict({"test": rows}), raising=False)
    images = {doc["question"]: doc["image"] for doc in docs}
    task = ConfigurableTask(
        config={
            "task": "colours", "test_split": "test", "output_type": "generate_until",
            "doc_to_visual": lambda doc: [images[doc["question"]]], "doc_to_text": lambda doc: doc["question"],
            "doc_to_target": "answer", "generation_kwargs": {"max_new_tokens": 4, "do_sample": False},
            "process_results": lambda doc, results: {"right": float(results[0] == doc["answer"]), "said": results[0]},
            "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
        },
        model_name=MODEL,
    )  # fmt: skip
    found = simple_evaluate(lm, tasks=[task], log_samples=True)
    said = [sample["filtered_resps"][0] for sample in sorted(found["samples"]["colours"], key=lambda each: each["doc_id"])]
    (first,) = generate(toy_model, [lm.style.prompt([], [], [docs[0]["image"], "is it red?"])], Decoding(4, max_images=0))
    assert said[0] == first.text and len(said) == 6
    right = sum(text == wanted for text, wanted in zip(said, expected, strict=True)) / 6
    assert found["results"]["colours"]["right,none"] == pytest.approx(right)
