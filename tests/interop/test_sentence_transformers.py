"""FROMAGe in sentence-transformers: the same rows as ours, by its own class, its evaluator and its search."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import semantic_search

from fromage.cli.main import main
from fromage.errors import UserError
from fromage.models.fromage import Fromage, load_model
from fromage.retrieval.queries import embed_queries


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    ours, out = (tmp_path_factory.mktemp("exported") / name for name in ("ours", "st"))
    model.save_pretrained(ours, "float32")
    assert main(["export", "--ckpt", str(ours), "--format", "sentence-transformers", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def encoder(exported):
    return SentenceTransformer(str(exported), trust_remote_code=True, device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def images(folder):
    return {path.stem: Image.open(path) for path in sorted(folder.glob("*.png"))}


def same(rows, model, inputs):
    return np.allclose(rows, embed_queries(model, inputs).numpy(), atol=1e-5)


def test_texts_images_and_interleaved_lists_are_embedded_as_ours(encoder, model, images):
    red, blue = images["red"], images["blue"]
    mixed = ["a red star", red, ["a star like", blue, "at night"], [red, "and", blue], ["two ", "texts"], "", "x" * 90, blue]
    rows = encoder.encode(mixed, batch_size=3)
    assert rows.shape == (len(mixed), 32) and same(rows, model, mixed)
    assert same([encoder.encode(one) for one in ("a red star", red)], model, ["a red star", red]), "one input is one row"
    assert encoder.encode("a", convert_to_tensor=True).norm() == pytest.approx(1)
    assert (encoder.get_embedding_dimension(), encoder.similarity_fn_name) == (32, "cosine")
    assert encoder.encode([]).size == 0


def test_dictionaries_and_messages_say_the_same(encoder, model, images, folder):
    red = images["red"]
    parts = [{"type": "text", "text": "like"}, {"type": "image", "image": red}]
    said = [
        {"text": "like", "image": red},
        {"image": red, "text": "like"},
        {"image": str(folder / "red.png")},
        {"image": [red, images["blue"]]},
        [{"role": "user", "content": parts}],
        {"role": "user", "content": "like"},
    ]
    meant = [["like", red], [red, "like"], red, [red, images["blue"]], ["like", red], "like"]
    for one, ours in zip(said, meant, strict=True):
        assert same(encoder.encode([one]), model, [ours]), one


def test_a_text_is_no_path_and_other_inputs_are_refused_in_a_line(encoder, model, folder):
    path = str(folder / "red.png")
    with pytest.warns(UserWarning, match="taken as a text"):
        rows = encoder.encode([path])
    assert same(rows, model, [path]) and not same(rows, model, [Image.open(path)])
    for bad, told in (([3], "int"), ([{"sound": "a.wav"}], "sound"), ([{"image": "/no/such.png"}], "no/such.png")):
        with pytest.raises(UserError, match=told) as refused:
            encoder.encode(bad)
        assert "\n" not in str(refused.value)


def test_a_prompt_stands_in_front_of_the_first_text(encoder, model, images):
    assert encoder.prompts == {"query": "", "document": ""}
    red = images["red"]
    inputs = ["star", red, [red, "star", "s"]]
    meant = ["find: star", red, [red, "find: star", "s"]]
    assert same(encoder.encode(inputs, prompt="find: "), model, meant)
    assert same(encoder.encode_query(inputs), model, inputs) and same(encoder.encode_document(inputs), model, inputs)


def test_its_evaluator_and_its_search_read_images(encoder, model, index, images):
    names = list(images)
    queries = {f"q{name}": f"{name} thing" for name in names}
    rows = embed_queries(model, [queries[f"q{name}"] for name in names])
    corpus = embed_queries(model, [images[name] for name in names])
    best = (rows @ corpus.T).argmax(1)
    wanted = {f"q{name}": {names[best[i]]} for i, name in enumerate(names)}
    evaluator = InformationRetrievalEvaluator(queries, images, wanted, mrr_at_k=[1], ndcg_at_k=[1], accuracy_at_k=[1],
                                              precision_recall_at_k=[1], map_at_k=[1], name="colours")  # fmt: skip
    assert evaluator(encoder)["colours_cosine_accuracy@1"] == 1.0
    found = semantic_search(encoder.encode(list(queries.values())), encoder.encode(list(images.values())), top_k=6)
    for row, hits in zip(rows.numpy(), found, strict=True):
        ours = index.search(row[None], 6)[0]
        assert [names[hit["corpus_id"]] for hit in hits] == [hit.caption for hit in ours]
        assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in ours], abs=1e-5)


def test_the_folder_is_ours_too_and_is_saved_again_as_it_was(encoder, exported, model, tmp_path):
    assert load_model(exported).fingerprint() == model.fingerprint()
    assert "SentenceTransformer" in (exported / "README.md").read_text("utf-8")
    encoder.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu", local_files_only=True)
    assert np.array_equal(again.encode(["a star"]), encoder.encode(["a star"]))
    (module,) = json.loads((tmp_path / "again/modules.json").read_text("utf-8"))
    assert module["type"] == "fromage.interop.sentence_transformers.FromageEncoder"


def test_options_of_loading(exported):
    half = SentenceTransformer(str(exported), trust_remote_code=True, device="cpu", local_files_only=True,
                               model_kwargs={"torch_dtype": torch.bfloat16})  # fmt: skip
    lm = half[0].model.lm.hf
    assert lm.dtype == torch.bfloat16 and half.max_seq_length == lm.config.max_position_embeddings
    with pytest.raises(UserError, match="attn_implementation is not known"):
        SentenceTransformer(str(exported), trust_remote_code=True, device="cpu", local_files_only=True,
                            model_kwargs={"attn_implementation": "sdpa"})  # fmt: skip


def test_octopus_has_nothing_to_embed_and_what_is_there_is_not_replaced(exported, model, tmp_path, capsys):
    from fromage.checkpoints.format import read_folder
    from fromage.interop.sentence_transformers_folder import write_sentence_transformers

    saved = read_folder(exported)
    octopus = type(saved)(**vars(saved) | {"kind": "octopus"})
    with pytest.raises(UserError, match="Octopus embeds no texts"):
        write_sentence_transformers(octopus, tmp_path / "o")
    words = ["export", "--ckpt", str(exported), "--format", "sentence-transformers", "--out", str(exported)]
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert isinstance(model, Fromage) and main([*words[:-1], str(tmp_path / "second")]) == 0


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.modality", None)
    monkeypatch.delitem(sys.modules, "fromage.interop.sentence_transformers", raising=False)
    with pytest.raises(UserError, match=r"pip install '\.\[sentence-transformers\]'"):
        importlib.import_module("fromage.interop.sentence_transformers")
