"""Answers of text and images, whole and streamed."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from fromage.data.image_source import Item
from fromage.errors import UserError
from fromage.generation.generate import Answer, RetrievedImages, caption, caption_images, generate, stream
from fromage.generation.options import Decoding
from fromage.models.fromage import load_model
from fromage.models.prompts import encode_images, prompt_ids
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.results import load_images

TWO = Decoding(12, min_tokens=3, ret_bias=60.0, max_images=2, images_per_ret=2)


@pytest.fixture
def images(world):
    return sorted((world / "coco" / "val2017").glob("*"))


@pytest.fixture
def index(toy_model, images):
    rows = toy_model.embed_images(encode_images(toy_model, images[:20])).detach().numpy()  # (N, q)
    return FaissIndex.build(rows, [Item(str(path)) for path in images[:20]], toy_model.fingerprint())


@pytest.fixture
def prompts(images):
    return [["a big heart", images[0], "and a"], ["a small"], [Image.open(images[1]), "on", images[2]], []]


def gist(answer):
    """An answer without its scores, which rounding moves."""
    return [part if isinstance(part, str) else [hit.path for hit in part.hits] for part in answer.parts], answer.ids


def test_text_and_images_in_the_order_they_came(toy_model, index, prompts):
    for answer in generate(toy_model, prompts, TWO, index):
        # [RET] [RET] after three tokens
        assert [type(part) for part in answer.parts[:3]] == [str, RetrievedImages, RetrievedImages]
        assert 5 <= len(answer.ids) <= 12 and answer.shown == answer.parts[1:3]
        texts = [part for part in answer.parts if isinstance(part, str)]
        assert answer.text == " ".join(text.strip() for text in texts)
        assert "".join(texts) == "".join(toy_model.tokenizer.decode(ids) for ids in (answer.ids[:3], answer.ids[5:]))


def test_images_are_those_nearest_and_neither_the_prompts_nor_shown_before(toy_model, index, prompts, images):
    for prompt, answer in zip(prompts, generate(toy_model, prompts, TWO, index), strict=True):
        barred = {str(part) for part in prompt if isinstance(part, Path)}
        if "on" in prompt:
            barred.add(str(images[1]))  # given as an image
        for shown in answer.shown:
            want = index.search(shown.embedding[None], 2, exclude=barred)[0]
            assert [hit.path for hit in shown.hits] == [hit.path for hit in want]
            barred |= {hit.path for hit in shown.hits}


def test_found_images_can_be_opened(toy_model, index):
    (answer,) = generate(toy_model, ["a small"], TWO, index, load_images)
    for shown in answer.shown:
        assert len(shown.images) == 2 and all(image.mode == "RGB" for image in shown.images)


def test_batch_size_does_not_matter(toy_model, index, prompts):
    whole = map(gist, generate(toy_model, prompts, TWO, index))
    assert list(whole) == list(map(gist, generate(toy_model, prompts, TWO, index, batch_size=3)))
    assert generate(toy_model, []) == []


def test_an_answer_that_is_not_wanted_any_more_ends_and_the_others_are_as_before(toy_model, index, prompts):
    asked, whole = [], [gist(answer) for answer in generate(toy_model, prompts, TWO, index)]

    def wanted(number):
        asked.append(number)
        return number != 2 or asked.count(2) < 2

    answers = generate(toy_model, prompts, TWO, index, batch_size=3, wanted=wanted)
    assert [gist(answer) for number, answer in enumerate(answers) if number != 2] == [*whole[:2], *whole[3:]]
    assert len(answers[2].ids) == 2 and set(asked) == {0, 1, 2, 3}


def test_an_index_of_another_model_and_batches_of_nothing_are_refused(toy_model, index):
    with torch.no_grad():
        toy_model.logit_scale += 1
    for answer in (generate, lambda model, prompts, *how: stream(model, prompts[0], *how)):
        with pytest.raises(UserError, match="built with checkpoint"):
            answer(toy_model, ["a"], TWO, index)
    with pytest.raises(UserError, match="batch_size is 0"):
        generate(toy_model, ["a"], batch_size=0)


def test_a_stream_is_the_answer_in_pieces(toy_model, index, prompts):
    for decoding in (TWO, Decoding(16, stop="a"), Decoding(9, temperature=1.0, seed=2)):
        for prompt in prompts:
            pieces = list(stream(toy_model, prompt, decoding, index))
            (answer,) = generate(toy_model, [prompt], decoding, index)
            assert gist(Answer.of(pieces, answer.ids)) == gist(answer)
    assert len([piece for piece in stream(toy_model, "a", Decoding(12)) if isinstance(piece, str)]) > 5


def test_a_stream_gives_a_piece_before_the_answer_is_whole(toy_model, monkeypatch):
    slowed(toy_model, monkeypatch)
    seen = [time.monotonic() for _ in stream(toy_model, "a", Decoding(8, max_images=0, min_new_tokens=8))]
    assert len(seen) > 4 and seen[-1] - seen[0] > 0.02 * (len(seen) - 2)  # at the pace of the language model


def slowed(model, monkeypatch, seconds=0.02):
    """Let each step of the language model take a while; returns the list that grows with each."""
    head, steps = model.lm.hf.get_output_embeddings(), []
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: time.sleep(seconds) or steps.append(1) or forward(hidden))
    return steps


@pytest.mark.parametrize("how", ["close", "forget", "break with an error"])
def test_closing_a_stream_stops_decoding(toy_model, monkeypatch, how):
    steps = slowed(toy_model, monkeypatch)
    before = threading.active_count()
    pieces = stream(toy_model, "a", Decoding(300, min_new_tokens=300, max_images=0))
    next(pieces)
    if how == "close":
        pieces.close()
    elif how == "forget":
        del pieces
    else:
        with pytest.raises(KeyError):
            pieces.throw(KeyError)
    assert threading.active_count() <= before and len(steps) < 30
    done = len(steps)
    time.sleep(0.1)
    assert len(steps) == done
    head = toy_model.lm.hf.get_output_embeddings()
    assert not head._forward_pre_hooks


def test_errors_of_the_thread_are_raised_in_the_reader(toy_model, monkeypatch):
    def fail(hidden):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(toy_model.lm.hf.get_output_embeddings(), "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream(toy_model, "a"))


def test_what_is_wrong_with_the_prompt_is_said_at_once(toy_model, tmp_path):
    with pytest.raises(UserError, match="missing"):
        stream(toy_model, [tmp_path / "missing.jpg"])


def test_two_streams_at_a_time(toy_model, index):
    """Each takes its own hidden states and tokens, whatever the other does."""
    prompts = ["a small", "a big heart and"]
    want = generate(toy_model, prompts, TWO, index)
    streams = [stream(toy_model, prompt, TWO, index) for prompt in prompts]
    pieces = [[], []]
    threads = [threading.Thread(target=lambda i=i: pieces[i].extend(streams[i])) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert gist(Answer.of(pieces[i], want[i].ids)) == gist(want[i])


def test_captions_are_answers_to_the_image_and_the_start(toy_model, images):
    features = encode_images(toy_model, images[:3])
    made = caption_images(toy_model, features, max_new_tokens=10)
    answers = generate(toy_model, [[path] for path in images[:3]], Decoding(10, stop="\n", max_images=0))
    assert made == [answer.text for answer in answers] and all(made)
    assert made == caption_images(toy_model, features, max_new_tokens=10, batch_size=2)
    assert caption_images(toy_model, torch.empty(0, toy_model.vision.width)) == []


def test_captions_end_where_the_answers_of_a_model_stop(toy_model, images, monkeypatch):
    features = encode_images(toy_model, images)
    whole = caption_images(toy_model, features, max_new_tokens=10)
    letter = whole[0].split()[1][0]
    monkeypatch.setattr(toy_model, "generation", {"decoding": {"stop": [letter]}})
    made = caption_images(toy_model, features, max_new_tokens=10)
    assert made == [text.partition(letter)[0].strip() for text in whole] and made[0] != whole[0]


def test_captions_of_a_model_with_a_prompt_are_what_follows_it(toy_model, images, tmp_path):
    toy_model.save_pretrained(tmp_path, "float32")
    without, model = load_model(tmp_path), load_model(tmp_path, input_prompt="a red")
    features = encode_images(model, images[:3])
    made = caption_images(model, features, max_new_tokens=10)
    prompts = [[path, "a red"] for path in images[:3]]
    assert made == [answer.text for answer in generate(model, prompts, Decoding(10, stop="\n", max_images=0))]
    assert made == caption(model, images[:3], max_new_tokens=10) and not any(text.startswith("a red") for text in made)
    assert without.config.input_prompt == "" and caption_images(without, features, max_new_tokens=10) != made
    assert prompt_ids(model, prompts[0])[: model.k + 1] == [model.tokenizer.image_id] * model.k + model.tokenizer.start()
    model.save_pretrained(tmp_path / "again", "float32")
    assert load_model(tmp_path / "again").config.input_prompt == "a red" and model.fingerprint() == without.fingerprint()


def test_neighbouring_texts_of_an_answer_become_one():
    shown = RetrievedImages(torch.zeros(2).numpy())
    answer = Answer.of(["a ", "red", shown, shown, " star ", ""], [1, 2])
    assert answer.parts == ["a red", shown, shown, " star "] and answer.text == "a red star" and answer.ids == [1, 2]


def test_the_benchmark_runs_and_its_two_sides_agree(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "tools")
    import bench_generate

    monkeypatch.setattr(bench_generate, "NEW", 4)
    monkeypatch.setattr(bench_generate, "CANDIDATES", 6)
    bench_generate.main(["--preset", "tiny", "--rounds", "1", "--json", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["speedup_kv_cache"] > 0 and report["speedup_scoring"] > 0
    halves = report.get("half_weights")  # where PyTorch has such kernels for this processor
    assert len(report["seconds"]) == 4 + bool(halves)
    assert not halves or (halves["speedup"] > 0 and halves["changed_tokens"] <= 1)
    assert report["same_tokens"] and report["max_score_error"] < 1e-3


def test_captions_of_images_however_they_are_named(toy_model, images):
    path = images[0]
    want = caption_images(toy_model, encode_images(toy_model, [path]))
    for one in (path, str(path), Image.open(path), encode_images(toy_model, [path])[0]):
        assert caption(toy_model, one) == want
    assert caption(toy_model, [path, str(path)]) == want * 2 and caption(toy_model, []) == []
    with pytest.raises(UserError, match=r"gone\.png"):
        caption(toy_model, "gone.png")


def test_min_tokens_bars_ret_and_min_new_tokens_the_end(toy_model, monkeypatch):
    head = toy_model.lm.hf.get_output_embeddings()
    forward, end = head.forward, toy_model.tokenizer.eos_id

    def eager_to_end(hidden):
        logits = forward(hidden)
        logits[..., end] += 1e4
        return logits

    monkeypatch.setattr(head, "forward", eager_to_end)
    assert [len(answer.ids) for answer in generate(toy_model, ["a", "a star"], Decoding(8, min_tokens=5))] == [0, 0]
    answers = generate(toy_model, ["a", "a star"], Decoding(8, min_new_tokens=5, ret_bias=2e4))
    assert all(len(answer.ids) == 5 and answer.ids[0] == toy_model.tokenizer.ret_id for answer in answers)
    (answer,) = generate(toy_model, ["a"], Decoding(8, min_tokens=5, min_new_tokens=6, ret_bias=2e4))
    assert answer.ids.index(toy_model.tokenizer.ret_id) == 5 and len(answer.ids) == 6
