"""Tuning the [RET] bias: margins say which bias brings an image, the cut is the best one, and the result is stored."""

import json
from dataclasses import replace

import pytest
import torch

from fromage.checkpoints.format import GENERATION
from fromage.cli.main import main
from fromage.cli.talk import Opening
from fromage.errors import UserError
from fromage.generation.chat import Chat
from fromage.generation.generate import generate
from fromage.generation.options import Decoding
from fromage.generation.preset import Preset
from fromage.generation.ret_tuning import best_cut, ret_margins, tune_ret
from fromage.models.fromage import Fromage, load_model

COLOURS, SHAPES = ("red", "blue", "green", "yellow"), ("star", "ring", "heart")
TEXTS = [f"a small {colour} {shape}" for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="module")
def parted(model):
    """The texts in two kinds, by their margins, each in an order that mixes it."""
    order = ret_margins(model, TEXTS, Decoding(3, stop=("\n",))).argsort(descending=True).tolist()
    few = len(TEXTS) // 3
    return {"images": [TEXTS[i] for i in order[:few]], "words": [TEXTS[i] for i in order[-few:]]}


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(6, min_tokens=3),
        Decoding(8, stop=(" ", ".")),
        Decoding(8, stop=("a", "o"), min_new_tokens=4),
        Decoding(4, authors_ret_scale=0.5),
        Decoding(1),
    ],
)
@pytest.mark.parametrize("r", [1, 3])
def test_an_image_comes_exactly_from_the_margin_on(model, decoding, r):
    torch.manual_seed(1)
    model = model if r == 1 else Fromage.load(k=2, q=8, r=r, ret_attention="stacked")
    margins = ret_margins(model, TEXTS[:2], decoding)
    if decoding.max_new_tokens < r:
        assert (margins == -1e4).all(), "no room for [RET]"
        return
    for text, margin in zip(TEXTS, margins.tolist(), strict=False):
        for bias, comes in ((-margin + 1e-2, True), (-margin - 1e-2, False)):
            (answer,) = generate(model, [text], replace(decoding, ret_bias=bias))
            assert (model.tokenizer.ret_id in answer.ids) is comes


@pytest.mark.parametrize(
    ("above", "below", "cut", "right"),
    [
        ([5, 7], [1, 3], 4, 1),
        ([5, 7, 2], [1, 3], 4, 5 / 6),
        ([9, 1], [5, 5, 5, 5], 7, 0.75),  # each kind counts as much, whatever its number
        ([9, 4], [1, 8], 2.5, 0.75),  # of two gaps as good, the wider
        ([9, 4, 4], [1, 8, 1], 2.5, 5 / 6),
    ],
)
def test_the_cut_parts_best(above, below, cut, right):
    found = best_cut(torch.tensor(above, dtype=torch.float), torch.tensor(below, dtype=torch.float))
    assert found == (pytest.approx(cut), pytest.approx(right))


def test_what_does_not_part_is_no_better_than_chance():
    same = torch.tensor([2.0, 2.0])
    assert best_cut(same, same) == (1.0, 0.5) and best_cut(same - 5, same)[1] == 0.5


def test_half_chooses_and_the_other_half_judges(model, parted):
    preset = Preset(style="alone", decoding=Decoding(3, ret_bias=50, temperature=2.0))
    found = tune_ret(model, parted, preset)
    assert found.accuracy == 100 and found.after == {"images": 100, "words": 0} and found.judged == 100
    chosen = {kind: texts[::2] for kind, texts in parted.items()}
    swapped = {kind: [x for pair in zip(chosen[kind], TEXTS, strict=False) for x in pair] for kind in chosen}
    assert tune_ret(model, swapped, preset).bias == found.bias, "what judges does not choose"
    lows, highs = (ret_margins(model, chosen[kind], Decoding(3, stop=("\n",))) for kind in ("words", "images"))
    assert -found.bias == pytest.approx(float(lows.max() + highs.min()) / 2, abs=1e-3)


def test_a_model_that_never_says_ret_has_no_bias():
    with pytest.raises(UserError, match="never says"):
        tune_ret(Fromage.load(k=1, q=4, pooling="last"), {"images": TEXTS, "words": TEXTS}, Preset())


def test_it_is_stored_beside_the_checkpoint_and_is_the_default_there(model, parted, tmp_path, capsys):
    model.save_pretrained(tmp_path / "m", "float32")
    about = {"style": "alone", "decoding": {"max_new_tokens": 3, "ret_bias": 9}, "examples": ["a star"], "name": "x"}
    (tmp_path / "m" / GENERATION).write_text(json.dumps(about))
    (tmp_path / "asked.json").write_text(json.dumps(parted))
    assert main(["tune-ret", str(tmp_path / "m"), str(tmp_path / "asked.json"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["judged"] == 100 and told["after"] == {"images": 100, "words": 0} and told["ret_bias"] != 9
    stored = json.loads((tmp_path / "m" / GENERATION).read_text())
    assert stored == about | {"decoding": {"max_new_tokens": 3, "ret_bias": told["ret_bias"]}}
    assert Chat(load_model(tmp_path / "m")).decoding.ret_bias == told["ret_bias"]
    preset = Opening(ckpt=str(tmp_path / "m"), device="cpu").open()[2]
    assert preset.decoding.ret_bias == told["ret_bias"] and preset.over(decoding={"ret_bias": 0.0}).decoding.ret_bias == 0
    assert main(["tune-ret", str(tmp_path / "m"), str(tmp_path / "asked.json"), "--style", "plain"]) == 0
    out = capsys.readouterr().out
    stored = json.loads((tmp_path / "m" / GENERATION).read_text())
    assert stored["style"] == "plain" and stored["name"] == "x" and f"{stored['decoding']['ret_bias']:g}" in out
    (tmp_path / "asked.json").write_text(json.dumps({"images": TEXTS, "words": TEXTS}))
    assert main(["tune-ret", str(tmp_path / "m"), str(tmp_path / "asked.json")]) == 2
    assert "no [RET] bias parts" in capsys.readouterr().err
    assert json.loads((tmp_path / "m" / GENERATION).read_text()) == stored


def test_beside_a_runs_checkpoint(model, parted, tmp_path, capsys):
    place = tmp_path / "run" / "checkpoints"
    place.mkdir(parents=True)
    state = {f"model.{name}": value for name, value in model.trained().items()}
    torch.save({"state_dict": state, "hyper_parameters": {**vars(model.config)}, "pytorch-lightning_version": "2.5.0"},
               place / "last.ckpt")  # fmt: skip
    (tmp_path / "asked.json").write_text(json.dumps(parted))
    for ckpt in (tmp_path / "run", place / "last.ckpt"):
        assert main(["tune-ret", str(ckpt), str(tmp_path / "asked.json"), "--style", "alone"]) == 0
        assert json.loads((place / GENERATION).read_text())["style"] == "alone"
        (place / GENERATION).unlink()
    assert main(["tune-ret", "some/body", str(tmp_path / "asked.json")]) == 2
    assert "fromage export --ckpt some/body" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "images must be a list of texts"),
        ('{"images": ["a", "b", "c", "d"]}', "words must be a list of texts"),
        ('{"images": ["a", " "], "words": []}', "images must be a list of texts that are not empty"),
        ('{"images": ["a", "b", "c"], "words": ["d"]}', "3 images are too few; give 4"),
        ("{", "is no JSON"),
    ],
)
def test_odd_messages_are_one_line(tmp_path, content, told, capsys):
    (tmp_path / "asked.json").write_text(content)
    (tmp_path / "config.json").write_text("{}")
    assert main(["tune-ret", str(tmp_path), str(tmp_path / "asked.json")]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
