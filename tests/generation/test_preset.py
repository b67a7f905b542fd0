"""How to talk with a model: what generation.json may say, who keeps it and who reads it."""

import json

import pytest
import torch

from fromage.checkpoints.authors import read_authors, write_authors
from fromage.checkpoints.format import GENERATION
from fromage.checkpoints.load import read_saved
from fromage.errors import UserError
from fromage.generation.chat import Chat
from fromage.generation.options import Decoding
from fromage.generation.preset import Preset, read_preset
from fromage.generation.styles import STYLES
from fromage.models.fromage import Fromage, load_model
from fromage.models.pretrained import for_disk

SAID = {"style": "alone", "decoding": {"ret_bias": 20, "max_new_tokens": 3}, "system": "a world", "examples": ["a star"]}


@pytest.fixture
def talker():
    torch.manual_seed(0)
    model = Fromage.load(k=2, q=16)
    model.generation = SAID
    return model


def test_it_is_read_and_written():
    preset = read_preset(SAID)
    assert preset.decoding == Decoding(ret_bias=20, max_new_tokens=3) and preset.style == "alone"
    assert read_preset(json.loads(json.dumps(preset.stored()))) == preset and read_preset(None) == Preset()
    assert read_preset(Preset(decoding=Decoding(stop=["x"], end_at_image=True)).stored()).decoding.stop == ("x",)
    over = preset.over("plain", "", {"ret_bias": 1.0})
    assert (over.style, over.system, over.decoding) == ("plain", "", Decoding(ret_bias=1.0, max_new_tokens=3))
    assert preset.over() == preset


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ({"stile": "alone"}, "unknown key 'stile'; known are about, decoding"),
        ({"decoding": {"ret_bais": 1}}, "unknown key 'ret_bais'"),
        ({"decoding": []}, "options by name"),
        ({"decoding": {"max_new_tokens": 10**9}}, "max_new_tokens is 1000000000; it must be from 1 to 512"),
        ({"decoding": {"images_per_ret": 900}}, "images_per_ret is 900"),
        ({"decoding": {"ret_bias": float("nan")}}, "ret_bias"),
        ({"decoding": {"ret_bias": "high"}}, "ret_bias"),
        ({"decoding": {"use_cache": 1}}, "use_cache must be true or false"),
        ({"decoding": {"stop": ["x"] * 9}}, "stop must be at most 8 texts"),
        ({"decoding": {"stop": "x"}}, "stop must be"),
        ({"style": ["alone"]}, "style must be a text"),
        ({"system": "x" * 4001}, "system must be a text of at most 4000 characters"),
        ({"examples": ["x"] * 9}, "examples must be at most 8 texts"),
        ({"examples": "a star"}, "examples must be"),
    ],
)
def test_what_it_must_not_say_is_one_line(stored, told):
    with pytest.raises(UserError, match=told) as error:
        read_preset(stored)
    assert str(error.value).startswith("generation.json: ") and "\n" not in str(error.value)


def test_an_unknown_style_is_named(talker):
    talker.generation = {"style": "verse"}
    with pytest.raises(UserError, match=f"verse: there are {', '.join(STYLES)}"):
        Chat(talker)


def test_a_chat_begins_with_it_and_arguments_come_first(talker):
    chat = Chat(talker)
    assert chat.style is STYLES["alone"] and chat.decoding.ret_bias == 20 and chat.prompt("a")[0] == "a worlda"
    chat = Chat(talker, decoding=Decoding(), style="plain", system=())
    assert chat.style is STYLES["plain"] and chat.decoding == Decoding() and chat.prompt("a") == ["a"]


def test_it_is_kept_wherever_the_weights_go(talker, tmp_path):
    talker.save_pretrained(tmp_path / "ours", "float32")
    assert json.loads((tmp_path / "ours" / GENERATION).read_text()) == SAID
    assert load_model(tmp_path / "ours").generation == SAID
    for_them = for_disk(Fromage, read_saved(tmp_path / "ours"), "float32")
    for_them.settings["vision"], for_them.settings["vision_weights"] = "ViT-B-32-quickgelu", "openai"
    write_authors(for_them, tmp_path / "authors")
    assert read_authors(tmp_path / "authors").generation == SAID, "so fromage import copies it"
    talker.generation = None
    talker.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / GENERATION).exists(), "it was the former model's"


def test_beside_a_lightning_checkpoint(talker, tmp_path):
    state = {f"model.{name}": value for name, value in talker.trained().items()}
    torch.save({"state_dict": state, "hyper_parameters": {**vars(talker.config)}, "pytorch-lightning_version": "2.5.0"},
               tmp_path / "last.ckpt")  # fmt: skip
    assert load_model(tmp_path / "last.ckpt").generation is None
    (tmp_path / GENERATION).write_text(json.dumps(SAID))
    assert load_model(tmp_path / "last.ckpt").generation == SAID


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 60_000, b'{"a": "' + b"x" * 70_000 + b'"}'])
def test_a_damaged_one_is_one_line(talker, tmp_path, content):
    talker.save_pretrained(tmp_path)
    (tmp_path / GENERATION).write_bytes(content)
    with pytest.raises(UserError, match=r"generation\.json: .* or remove it$"):
        load_model(tmp_path)


def test_an_answer_may_end_at_its_last_image(model, index):
    options = {"ret_bias": 100, "max_new_tokens": 12, "max_images": 2}
    from fromage.generation.generate import generate

    (on,) = generate(model, ["a star"], Decoding(**options), index)
    (ends,) = generate(model, ["a star"], Decoding(**options, end_at_image=True), index)
    assert [len(shown.hits) for shown in ends.shown] == [1, 1] and isinstance(on.parts[-1], str)
    assert ends.parts[-1] is ends.shown[-1] and len(ends.ids) == 2
