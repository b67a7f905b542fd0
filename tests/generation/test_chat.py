"""A conversation: what stands in its prompts, what is cut when it grows, and that turns leave no trace when broken off."""

from pathlib import Path

import pytest
import torch

from fromage.errors import UserError
from fromage.generation.chat import Chat
from fromage.generation.generate import generate
from fromage.generation.options import Decoding
from fromage.generation.retrieved import RetrievedImages
from fromage.models.fromage import Fromage
from fromage.models.prompts import RET, prompt_ids, prompt_length

IMAGES_PLEASE = Decoding(max_new_tokens=6, ret_bias=1e4, max_images=1)


def words(model, chat, said="a star"):
    return model.tokenizer.hf.decode(prompt_ids(model, chat.prompt([said])))


def test_an_answer_has_its_token_ids(model):
    chat = Chat(model, decoding=Decoding(max_new_tokens=4, min_tokens=2, ret_bias=1e4, max_images=1))
    prompt = chat.prompt(["a ring"])
    answer, (same,) = chat.say("a ring"), generate(model, [prompt], chat._decoding())
    assert answer.ids == same.ids != [] and answer.cut == same.cut is True


def test_turns_examples_and_system_stand_in_the_prompt_in_their_order(model):
    chat = Chat(model, system=["be kind."], examples=[(["one"], ["two"])], decoding=Decoding(max_new_tokens=4))
    answer = chat.say("a ring")
    want = f"be kind.\nQ: one\nA:two\nQ: a ring\nA:{''.join(answer.parts)}\nQ: a star\nA:"
    assert model.tokenizer.decode(prompt_ids(model, chat.prompt(["a star"]))) == model.tokenizer.decode(
        model.tokenizer.encode(want)
    )
    chat.undo()
    assert "a ring" not in words(model, chat)


@pytest.mark.parametrize(("style", "front"), [("dialogue", "be kind.\nQ: hi\nA:"), ("plain", "be kind. hi")])
def test_the_system_prompt_does_not_run_into_the_first_turn(model, style, front):
    assert "".join(Chat(model, style=style, system=["be kind."]).prompt(["hi"])) == front
    assert Chat(model, style=style, system=[""]).system == []


def test_images_come_back_and_stand_in_the_history(model, index, folder):
    chat = Chat(model, index, IMAGES_PLEASE, style="plain")
    answer = chat.say("a red star", folder / "red.png")
    (shown,) = answer.shown
    assert len(shown.images) == 1 and Path(shown.hits[0].path).exists()
    assert shown.hits[0].path != str(folder / "red.png"), "not the user's own image"
    features = [part for side in chat.turns[0].exchange for part in side if isinstance(part, torch.Tensor)]
    assert len(features) == 2, "what the user sent and what came back, encoded once"
    seen = {str(folder / "red.png"), shown.hits[0].path}
    for _ in range(len(index) - 2):
        (shown,) = chat.say("and another one").shown
        assert shown.hits[0].path not in seen, "no image twice in a conversation"
        seen.add(shown.hits[0].path)


def test_without_images_to_open_the_history_has_ret(model, index):
    chat = Chat(model, index, IMAGES_PLEASE, style="plain", resolve=None)
    chat.say("a red star")
    assert RET in chat.turns[0].exchange[1]


def test_an_image_alone_is_put_as_in_training(model, folder):
    chat = Chat(model, style="plain")
    (image,) = chat._encoded([folder / "blue.png"])
    places = [model.tokenizer.image_id] * model.k
    assert prompt_ids(model, chat.prompt([image])) == [*places, *model.tokenizer.start()]


@pytest.mark.parametrize("said", [["what is it?", "A"], ["A", "what ", "is it?"], ["A", "what is it?"]])
def test_in_a_dialogue_the_image_comes_first(model, folder, said):
    chat = Chat(model, decoding=Decoding(max_new_tokens=2))
    said = [folder / "blue.png" if part == "A" else part for part in said]
    ids = prompt_ids(model, chat.prompt(said))
    places, start = [model.tokenizer.image_id] * model.k, model.tokenizer.start()
    question = [*places, *start, *model.tokenizer.encode("Q: what is it?\nA:")]
    assert ids == question
    chat.say(*said)
    assert prompt_ids(model, chat.prompt(["and that?"]))[: len(question)] == question, "in the history too"


def test_images_between_texts_stay_there(model, folder):
    image = folder / "blue.png"
    prompt = Chat(model).prompt([image, "a", image, "b"])
    assert [part for part in prompt if isinstance(part, str)] == ["Q: a", "b\nA:"] and prompt[0] is prompt[2] is image
    assert Chat(model, style="plain").prompt(["a", image]) == ["a", image]


def test_the_oldest_turns_are_left_out_whole_then_the_examples_and_the_rest_never(model, folder):
    limit = model.lm.hf.config.max_position_embeddings
    chat = Chat(model, system=["be kind."], examples=[(["an example", folder / "red.png"], ["of an answer"])],
                decoding=Decoding(max_new_tokens=2))  # fmt: skip
    image = folder / "green.png"
    for _ in range(6):
        chat.say("a large blue ring on the left at night " * 4, image)
    prompt = chat.prompt(["a star"])
    assert prompt_length(model, prompt) + 2 <= limit
    images = sum(isinstance(part, torch.Tensor) for part in prompt)
    kept = words(model, chat).count("Q: ") - 2
    assert images == kept + 1, "each turn kept has its image, and so has the example"
    longer = chat.prompt(["a star " * ((limit - 20) // 2)])
    text = model.tokenizer.decode(prompt_ids(model, longer))
    assert "an example" not in text and text.startswith("be kind.")
    with pytest.raises(UserError, match="shorten"):
        chat.say("a star " * limit)


def test_no_text_is_tokenised_again_for_each_turn_that_is_left_out(model, monkeypatch):
    chat, asked = Chat(model, examples=[([f"what is {i}"], [f"it is {i}"]) for i in range(200)]), []
    encode = model.tokenizer.encode
    monkeypatch.setattr(model.tokenizer, "encode", lambda text: asked.append(text) or encode(text))
    prompt = chat.prompt(["a star"])
    assert "what is 199" in "".join(prompt) and "what is 0" not in "".join(prompt)
    assert len(asked) < 200 + 10, "each example once, and the prompt a few times"


def test_a_single_text_is_a_prompt_and_not_its_letters(model):
    chat = Chat(model, system="be kind.", examples=[("one", "two")])
    assert chat.prompt("hi") == Chat(model, system=["be kind."], examples=[(["one"], ["two"])]).prompt(["hi"])


def test_an_index_of_another_model_and_no_style_are_refused(model, index):
    other = Fromage.load(k=1, q=32)
    with pytest.raises(UserError, match="built with checkpoint"):
        Chat(other, index)
    with pytest.raises(UserError, match="dialogue, plain"):
        Chat(model, style="verse")


def test_a_turn_broken_off_leaves_no_trace(model, index, tmp_path):
    chat = Chat(model, index, Decoding(max_new_tokens=20))
    pieces = chat.stream("a star")
    next(pieces)
    pieces.close()
    assert chat.turns == []
    with pytest.raises(UserError, match="nothing"):
        chat.say(tmp_path / "nothing.png")
    assert chat.turns == []
    assert isinstance(chat.say("a star").text, str) and len(chat.turns) == 1


def test_streaming_gives_the_pieces_of_the_answer(model, index):
    chat, other = (Chat(model, index, IMAGES_PLEASE) for _ in range(2))
    pieces = list(chat.stream("a star"))
    answer = other.say("a star")
    assert any(isinstance(piece, RetrievedImages) for piece in pieces)
    assert "".join(p for p in pieces if isinstance(p, str)) == "".join(p for p in answer.parts if isinstance(p, str))


def test_two_conversations_know_nothing_of_each_other(model):
    one, other = Chat(model, decoding=Decoding(max_new_tokens=3)), Chat(model)
    one.say("a secret ring")
    assert "secret" not in words(model, other)


def test_alone_each_turn_stands_by_itself(model):
    chat = Chat(model, style="alone", decoding=Decoding(max_new_tokens=3), examples=[(["one"], ["two"])])
    chat.say("a ring")
    assert chat.prompt(["a star"]) == ["a star"] and len(chat.turns) == 1
