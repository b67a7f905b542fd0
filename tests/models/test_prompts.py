"""Interleaved prompts: what stands where, that a batch gives what single prompts give, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from fromage.checks import as_list
from fromage.errors import UserError
from fromage.generation.generate import caption, generate
from fromage.generation.options import Decoding
from fromage.generation.score import score, score_prompts
from fromage.models.fromage import Fromage
from fromage.models.prompts import (
    RET,
    START,
    Starts,
    Token,
    Url,
    batches_by_length,
    embed_prompts,
    encode_images,
    listed,
    path_or_url,
    prompt_ids,
    prompt_length,
)
from fromage.retrieval.queries import embed_queries, read_as


@pytest.fixture
def images(world):
    return sorted((world / "coco" / "val2017").glob("*"))[:4]


@pytest.fixture
def mixed(images):
    """Prompts of every kind, of different lengths."""
    return [
        ["a red star", images[0], "and", Image.open(images[1]), "together"],
        [images[0], images[0]],
        ["a small blue ring on the left of a big green square", RET],
        [],
        [images[2], START, "a"],
    ]


def spelled(model, prompt, starts=Starts.EACH):
    """A prompt's tokens as a string: < </s>, # one token of an image, @ [RET]; texts as decoded."""
    tokenizer, out, words = model.tokenizer, "", []
    marks = {tokenizer.bos_id: "<", tokenizer.image_id: "#", tokenizer.ret_id: "@"}
    for token in [*prompt_ids(model, prompt, starts), tokenizer.pad_id + 10**9]:
        if token not in marks and token < 10**9:
            words.append(token)
            continue
        out += tokenizer.hf.decode(words) + marks.get(token, "")
        words = []
    return out


@pytest.mark.parametrize(
    ("prompt", "each", "once"),
    [
        (["A", "a"], "##<a", "##<a"),
        (["A", "B", "a"], "####<a", "####<a"),
        (["A"], "##<", "##<"),
        (["A", RET], "##<@", "##<@"),
        (["a", RET], "<a@", "<a@"),
        ([RET], "<@", "<@"),
        (["a", "A", " star"], "<a##< star", "<a## star"),
        (["A", "a", "B", "star"], "##<a##<star", "##<a##star"),
        (["a", "A", RET], "<a##<@", "<a##@"),
        (["a", "A"], "<a##<", "<a##"),
        (["a", " star", "A", " and", " ring"], "<a star##< and ring", "<a star## and ring"),
        (["a ", RET, " star"], "<a@ star", "<a@ star"),
        (["A", START, "a", "B", "star"], "##<a##star", "##<a##star"),
        ([], "<", "<"),
    ],
)
def test_where_start_tokens_stand(toy_model, images, prompt, each, once):
    shown = {"A": images[0], "B": images[1]}
    parts = [shown.get(part, part) if isinstance(part, str) else part for part in prompt]
    assert [spelled(toy_model, parts, starts) for starts in Starts] == [each, once]


def test_a_captioned_image_stands_as_in_training(toy_model, images):
    caption = toy_model.tokenizer.caption("a red star.", 24)[:-1]
    places = [toy_model.tokenizer.image_id] * 2
    pair = [images[0], "a red star.", images[1], "a red star."]
    assert prompt_ids(toy_model, pair[:2]) == [*places, *caption]
    assert prompt_ids(toy_model, pair) == [*places, *caption, *places, *caption]
    assert prompt_ids(toy_model, ["a red star.", RET], Starts.ONCE) == toy_model.tokenizer.caption("a red star.", 24)
    assert prompt_ids(toy_model, "a red") == prompt_ids(toy_model, ["a red"])


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        (["A", "a"], "<##a"),
        (["A"], "<##"),
        (["a", "A", " star", RET], "<a## star@"),
        (["A", "a", "B", "star"], "<##a##star"),
        (["A", START, "a", START], "<##a"),
        ([START, "a", START, "star"], "<a star"),
        ([START, "A", "a"], "<##a"),
        ([], "<"),
    ],
)
def test_a_start_token_that_stands_first_stands_nowhere_else(images, prompt, tokens):
    model, shown = Fromage.load(k=2, q=32, start="first"), {"A": images[0], "B": images[1]}
    parts = [shown.get(part, part) if isinstance(part, str) else part for part in prompt]
    assert {spelled(model, parts, starts) for starts in Starts} == {tokens}
    template = [Token(7), *parts]
    assert prompt_ids(model, template)[0] == 7, "a template brings its own"


def test_a_place_of_the_start_token_is_the_models_own(tmp_path, monkeypatch):
    model = Fromage.load(k=2, q=32, start="first")
    assert model.fingerprint() != Fromage.load(k=2, q=32).fingerprint()
    model.save_pretrained(tmp_path, dtype="float32")
    assert Fromage.from_pretrained(tmp_path).start_first
    with pytest.raises(UserError, match=r"start second: must be after_images or first"):
        Fromage.load(k=2, q=32, start="second")
    monkeypatch.setattr(type(model.tokenizer), "start", lambda self: [])
    with pytest.raises(UserError, match=r"no start token; use start 'after_images'"):
        Fromage.load(k=2, q=32, start="first")


def test_adjacent_texts_are_one_string(toy_model, images):
    tokenizer = toy_model.tokenizer
    whole = [*tokenizer.start(), *tokenizer.encode("Q: What is a star?")]
    assert prompt_ids(toy_model, ["Q: ", "", "What is a ", "star?"]) == whole
    assert prompt_ids(toy_model, ["a star  ", " ", RET]) == [
        *tokenizer.start(),
        *tokenizer.encode("a star"),
        tokenizer.ret_id,
    ]


def test_ret_within_a_text_is_plain_and_said_to_be(toy_model, recwarn):
    with pytest.warns(UserWarning, match=r"'\[RET\]' within a text is plain text.*fromage\.RET"):
        ids = prompt_ids(toy_model, ["show me a star [RET]"])
    assert toy_model.tokenizer.ret_id not in ids
    prompt_ids(toy_model, ["show me a star", RET])
    assert not len(recwarn)


def test_lengths_are_counted_without_opening_images(toy_model, tmp_path):
    prompt = ["a", tmp_path / "missing.jpg", Url("https://nowhere.invalid/a.jpg"), RET]
    assert prompt_length(toy_model, prompt) == 1 + len(toy_model.tokenizer.encode("a")) + 2 * 2 + 1 + 1


def test_text_is_never_a_path_or_a_special_token(toy_model, images):
    ids = prompt_ids(toy_model, [str(images[0]), "[RET] <|image|> </s>"])
    tokenizer = toy_model.tokenizer
    assert tokenizer.image_id not in ids and tokenizer.ret_id not in ids and ids.count(tokenizer.bos_id) == 1


def test_embeddings_are_the_parts_own(toy_model, images):
    features = toy_model.vision(torch.stack([toy_model.vision.transform(Image.open(p)) for p in images[:2]]))
    batch = embed_prompts(toy_model, [[images[0], "a", images[1]]])
    words = toy_model.lm.embed(batch.ids)
    prefix = toy_model.visual_prefix(features)
    want = torch.cat([prefix[0], words[0, 2:-3], prefix[1], words[0, -1:]])
    torch.testing.assert_close(batch.embeds[0], want)
    torch.testing.assert_close(batch.features, features)
    assert batch.image_rows == [[0, 1]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_an_image_of_any_mode_is_the_same_opened_and_by_its_path(toy_model, tmp_path, mode):
    image = Image.new("RGBA", (32, 32), (200, 40, 90, 0))
    image.paste((10, 90, 200, 255), (8, 8, 24, 24))
    made = Image.new("I;16", (32, 32), 200 * 256) if mode == "I;16" else image.convert(mode)
    made.save(tmp_path / "a.png")
    opened, by_path = encode_images(toy_model, [Image.open(tmp_path / "a.png"), tmp_path / "a.png"])
    torch.testing.assert_close(opened, by_path)


def test_an_image_is_upright_opened_and_by_its_path_and_the_callers_stays_as_it_is(toy_model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: lies on its side
    image = Image.new("RGB", (32, 24), "red")
    image.paste("blue", (0, 0, 8, 24))
    image.save(tmp_path / "a.png", exif=exif)
    given = Image.open(tmp_path / "a.png")
    opened, by_path = encode_images(toy_model, [given, tmp_path / "a.png"])
    torch.testing.assert_close(opened, by_path, rtol=0, atol=1e-6)
    assert given.size == (32, 24)
    torch.testing.assert_close(embed_queries(toy_model, [given])[0], toy_model.embed_images(by_path[None])[0].detach())


def test_what_can_be_no_part_of_a_prompt(toy_model):
    width = toy_model.vision.width
    finite = rf"\({width},\) finite numbers"
    for part, named in (
        (Image.new("1", (1, 101)), "too narrow"),
        (Image.new("1", (0, 0)), "0 x 0"),
        (torch.ones(width + 1), finite),
        (torch.empty(0), finite),
        (torch.full((width,), torch.nan), finite),
        ("a \ud800", "half a character"),
    ):
        with pytest.raises(UserError, match=named):
            embed_prompts(toy_model, [["a", part]])


@torch.no_grad()
def test_queries_are_images_alone_or_read_in_front_of_ret(toy_model, images):
    image = Image.open(images[1])
    rows = embed_queries(toy_model, [["a", images[0]], [image], "a star", ["", images[2]], []])
    read = toy_model.embed_text([["a", images[0]], "a star", []])
    alone = toy_model.embed_images(encode_images(toy_model, [image, images[2]]))
    torch.testing.assert_close(rows, torch.stack([read[0], alone[0], read[1], alone[1], read[2]]))
    assert embed_queries(toy_model, []).shape == (0, 32)
    forms = [read_as(toy_model, query) for query in (["a", images[0], "b"], [image], "a star", [image, "at ", "night"], [])]
    assert forms == ["</s> a (image) b [RET]", "(image), compared as the index has it", "</s> a star [RET]",
                     "(image) </s> at night [RET]", "</s> [RET]"]  # fmt: skip


def test_a_batch_gives_what_single_prompts_give(toy_model, mixed):
    batch = embed_prompts(toy_model, mixed)
    hidden = toy_model.lm(batch.embeds, batch.mask)
    assert batch.mask.sum(1).tolist() == [prompt_length(toy_model, prompt) for prompt in mixed]
    assert batch.mask[:, -1].all()
    for row, prompt in zip(hidden, mixed, strict=True):
        alone = embed_prompts(toy_model, [prompt])
        assert alone.mask.all()
        want = toy_model.lm(alone.embeds, alone.mask)[0]
        logits = toy_model.lm.logits(row[-len(want) :]), toy_model.lm.logits(want)
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_each_distinct_image_runs_once_and_all_in_one_call(toy_model, mixed, monkeypatch):
    calls = []
    forward = toy_model.vision.forward
    monkeypatch.setattr(toy_model.vision, "forward", lambda pixels: calls.append(len(pixels)) or forward(pixels))
    batch = embed_prompts(toy_model, mixed)
    assert calls == [3]  # two of them twice
    assert batch.image_rows == [[0, 1], [0, 0], [], [], [2]] and len(batch.features) == 3


def test_features_stand_for_their_image(toy_model, images):
    features = encode_images(toy_model, images[:2])
    opened = embed_prompts(toy_model, [["a", images[0]], [images[1], "b"]])
    stored = embed_prompts(toy_model, [["a", features[0]], [features[1], "b"]])
    torch.testing.assert_close(stored.embeds, opened.embeds)
    assert encode_images(toy_model, []).shape == (0, toy_model.vision.width)


def test_addresses_are_fetched(toy_model, images, monkeypatch):
    import sys
    from types import SimpleNamespace

    asked = []
    fake = SimpleNamespace(FRESH=60, fetch_image=lambda url, max_age: asked.append(url) or Image.open(images[0]))
    monkeypatch.setitem(sys.modules, "fromage.images.fetch", fake)
    address = Url("https://example.org/a.jpg")
    batch = embed_prompts(toy_model, [[address], [Url("https://example.org/a.jpg"), "a"]])
    assert asked == [address]
    torch.testing.assert_close(batch.features, encode_images(toy_model, [images[0]]))


@torch.no_grad()
def test_retrieval_of_text_is_as_in_training(toy_model):
    texts = ["a red star.", "a small blue ring on the left and a big green square at the top, on the sea at night.", ""]
    rows = [torch.tensor(toy_model.tokenizer.caption(text, 99)) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=toy_model.tokenizer.pad_id)
    want = toy_model.embed_ret(toy_model.hidden_of_texts(ids, [len(row) for row in rows])[1])
    torch.testing.assert_close(toy_model.embed_text(texts), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(toy_model.embed_text(texts), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(toy_model.embed_text(texts, batch_size=2), want, atol=1e-5, rtol=1e-4)
    assert toy_model.embed_text([]).shape == (0, 32)


def test_texts_of_like_length_share_a_batch(toy_model, images, monkeypatch):
    seen, lm = [], toy_model.lm.forward
    monkeypatch.setattr(toy_model.lm, "forward", lambda embeds, *rest: seen.append(embeds.shape[1]) or lm(embeds, *rest))
    short, long = "a star", "a star " * 20
    toy_model.embed_text([short, long, [images[0], short], [long, images[0]]], batch_size=2)
    assert batches_by_length([short, long, "", [images[0], long + "."]], 3) == [[3, 1, 0], [2]]
    assert min(seen) < max(seen) / 5, "a short text was padded to the length of a long one"


@torch.no_grad()
@pytest.mark.parametrize("sees", ["sequential", "stacked"])
def test_several_ret_tokens_of_queries_and_captions_are_by_definition(sees):
    """Stacked, each is run alone after the text; sequential, the tokens are a plain continuation of it."""
    model = Fromage.load(q=32, r=3, ret_attention=sees, ret_fusion="transformer").eval()
    texts = ["a red star.", "a small blue ring on the left and a big green square at the top, on the sea at night.", ""]
    rows, states = [model.tokenizer.caption(text, 99) for text in texts], []
    for row in rows:
        before, rets = model.embed(torch.tensor([row[:-3]])), model.ret.input  # (1, n, d), (3, d)
        runs = [rets] if sees == "sequential" else [rets[:1], rets[1:2], rets[2:]]
        whole = [torch.cat([before, some[None]], 1) for some in runs]
        ends = [model.lm(e, torch.ones(e.shape[:2], dtype=torch.bool))[0, before.shape[1] :] for e in whole]
        states.append(torch.cat(ends))  # (3, d)
    want = model.embed_ret(torch.stack(states))
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=model.tokenizer.pad_id)
    got = model.hidden_of_texts(ids, [len(row) for row in rows])[1]
    torch.testing.assert_close(got, torch.stack(states), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.embed_text(texts), want, atol=1e-5, rtol=1e-4)
    assert prompt_ids(model, ["a red star.", RET]) == rows[0]


def test_ret_in_a_prompt_of_a_model_without_it_is_refused(toy_model, monkeypatch):
    monkeypatch.setattr(toy_model.tokenizer, "ret_ids", [])
    with pytest.raises(UserError, match=r"leave \[RET\] out of its prompts"):
        prompt_ids(toy_model, ["a red star", RET])


def test_a_model_that_reads_the_last_word_does_so_in_prompts_and_folders_too(tmp_path):
    model = Fromage.load(k=2, q=32, pooling="last")
    texts = ["a red star", "it is night, and the ring is small."]
    rows = [torch.tensor(model.tokenizer.caption(text, 40)) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=model.tokenizer.pad_id)
    want = model.embed_ret(model.hidden_of_texts(ids, [len(row) for row in rows])[1])
    torch.testing.assert_close(model.embed_text(texts), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.embed_text([f"{text} \n" for text in texts]), want, atol=1e-5, rtol=1e-4)
    assert read_as(model, "a red star ") == "</s> a red star"
    assert (answer := generate(model, texts, Decoding(4, ret_bias=1e4))) and not any(a.shown for a in answer)
    model.save_pretrained(tmp_path, dtype="float32")
    again = Fromage.from_pretrained(tmp_path)
    assert again.config.pooling == "last" and again.fingerprint() == model.fingerprint()
    model.config = replace(model.config, pooling="ret")
    assert again.fingerprint() != model.fingerprint()


def test_retrieval_of_mixed_prompts_does_not_depend_on_the_batch(toy_model, mixed):
    rows = toy_model.embed_text(mixed)
    alone = torch.cat([toy_model.embed_text([prompt]) for prompt in mixed])
    torch.testing.assert_close(rows, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(mixed)))


def test_the_longest_prompt(toy_model):
    limit = toy_model.lm.max_length
    ids = prompt_length(toy_model, ["star " * 40]) - 1
    words = "star " * (40 * (limit - 1) // ids)
    length = prompt_length(toy_model, [words])
    embed_prompts(toy_model, [[words]], room=limit - length)
    with pytest.raises(UserError, match=f"{length} tokens and {limit - length + 1} after it .* {limit} .*shorten"):
        embed_prompts(toy_model, [["a"], [words]], room=limit - length + 1)


def test_what_can_be_no_part(toy_model, tmp_path):
    with pytest.raises(UserError, match="not int"):
        embed_prompts(toy_model, [["a", 3]])
    with pytest.raises(UserError, match=r"missing\.jpg"):
        embed_prompts(toy_model, [[tmp_path / "missing.jpg"]])


def test_an_empty_prompt_needs_a_start_token(toy_model, monkeypatch):
    monkeypatch.setattr(toy_model.tokenizer, "bos_id", None)
    with pytest.raises(UserError, match="empty"):
        embed_prompts(toy_model, [[]])
    assert embed_prompts(toy_model, [["a"]]).mask.all()


def test_a_name_of_an_image_is_an_address_or_a_path():
    for name in ("http://a.b/c.jpg", "https://a.b/c.jpg?d=1"):
        assert path_or_url(name) == name and type(path_or_url(name)) is Url
    for name in ("a.jpg", "/b/0.tar#key", "ftp://a.b/c.jpg", "HTTP://a.b/c", "~/a.jpg", ""):
        assert path_or_url(name) == Path(name)


def test_a_bare_text_or_image_is_one_item_and_never_its_letters(toy_model, images):
    image = Image.open(images[0])
    assert [len(listed(one)) for one in ("a star", images[0], image, RET, torch.zeros(4), Url("http://x/y"))] == [1] * 6
    assert len(listed(["a", "b"])) == len(listed(torch.zeros(2, 4))) == 2 and as_list("a b") == ["a b"]
    assert len(generate(toy_model, "a star", Decoding(2))) == len(embed_queries(toy_model, "a star")) == 1
    assert torch.equal(toy_model.embed_text("a star"), toy_model.embed_text(["a star"]))
    assert len(score(toy_model, "a", " red star").total) == len(score_prompts(toy_model, "a star").total) == 1
    assert toy_model.caption(image) == caption(toy_model, [image]) == toy_model.caption(str(images[0]))
    assert len(toy_model.caption([image, images[1]])) == 2
