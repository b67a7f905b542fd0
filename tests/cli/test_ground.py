"""`fromage ground`: from an image and words to an answer, its boxes and a drawing."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_octopus import save_untrained

from fromage.apps.octopus_demo import HOME
from fromage.apps.tours import CHECKPOINT, FINISHED
from fromage.cli.find import as_json
from fromage.cli.main import main
from fromage.cli.talk import Opening
from fromage.errors import UserError
from fromage.models.prompts import embed_prompts
from fromage.octopus.answers import GroundedAnswer, read_text
from fromage.octopus.decoding import grounded, instruction, read_batch
from fromage.octopus.drawing import COLOURS, OTHERS, SIDE, draw_answer
from fromage.octopus.model import load_octopus

LEFT, RIGHT, ALL, EDGE = (0.1, 0.25, 0.4, 0.75), (0.6, 0.25, 0.9, 0.75), (0.0, 0.0, 1.0, 1.0), (0.99, 0.99, 1.0, 1.0)
FOUND = [(RIGHT, 0.9), (LEFT, 0.8), (ALL, 0.7), (EDGE, 0.6)]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return str(save_untrained(tmp_path_factory.mktemp("octopus") / "last.ckpt"))


@pytest.fixture(scope="module")
def segmenting(tmp_path_factory):
    return str(save_untrained(tmp_path_factory.mktemp("masks") / "last.ckpt", mask_scale=4))


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (200, 100), "navy").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def colours(page):
    return {colour for _, colour in page.getcolors(1 << 24)}


def pixel(page, x, y):
    """The colours within a few pixels of a place given in shares."""
    at = (round(x * page.width), round(y * page.height))
    return colours(page.crop((at[0] - 6, at[1] - 6, at[0] + 6, at[1] + 6)))


def test_a_folder_of_export_is_read_as_its_checkpoint(ckpt, photo, tmp_path, capsys):
    assert main(["export", "--ckpt", ckpt, "--dtype", "float32", "--out", str(tmp_path / "octopus")]) == 0
    capsys.readouterr()
    told = []
    for path in (ckpt, str(tmp_path / "octopus")):
        assert main(["ground", photo, "the star", "--ckpt", path, "--max-new-tokens", "3", "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1] and told[0]["candidates"]


@pytest.mark.parametrize("size", [(200, 100), (30, 90), (1200, 900), (1, 1)])
def test_a_drawing_shows_each_box_where_it_is_and_leaves_the_image(size):
    image = Image.new("RGB", size, "navy")
    page = draw_answer(image, GroundedAnswer("", [LEFT, " and ", RIGHT], FOUND, [1, 0], [0.8, 0.9]), top=1)
    assert colours(image) == {(0, 0, 128)} and max(page.size) >= SIDE and page.size[0] * size[1] == page.size[1] * size[0]
    assert COLOURS[0] in pixel(page, 0.1, 0.6) and COLOURS[1] in pixel(page, 0.9, 0.6)
    assert COLOURS[0] not in pixel(page, 0.6, 0.6) and OTHERS in pixel(page, 1, 0.5)
    assert pixel(page, 0.25, 0.6) == {(0, 0, 128)}


def test_other_candidates_are_thin_and_as_many_as_asked():
    image = Image.new("RGB", (640, 640))

    def grey(top, answer):
        return int((np.asarray(draw_answer(image, answer, top)) == OTHERS).all(-1).sum())

    answer = GroundedAnswer("", [LEFT], FOUND, [1], [0.8])
    assert [OTHERS in colours(draw_answer(image, answer, top)) for top in (0, 1)] == [False, True]
    assert grey(1, answer) < grey(2, answer) < grey(3, answer) == grey(9, answer) == grey(None, answer)
    assert grey(9, GroundedAnswer("", [], FOUND)) > grey(9, answer), "where nothing is pointed at there are candidates still"
    assert OTHERS not in colours(draw_answer(image, GroundedAnswer("", [LEFT], [(LEFT, 0.99), (ALL, 0.49)], [0], [0.99])))
    assert OTHERS not in colours(draw_answer(image, read_text("[0.100,0.250,0.400,0.750]")))


def test_boxes_in_pixels():
    told = as_json(GroundedAnswer("a star<d1>", ["a star", LEFT], FOUND, [1], [0.8]), (200, 100))
    assert told["boxes"] == [{"box": [20, 25, 80, 75], "score": 0.8}] and told["words"] == "a star"
    assert [each["score"] for each in told["candidates"]] == [0.9, 0.8, 0.7, 0.6]
    assert told["candidates"][2]["box"] == [0, 0, 200, 100]
    spelled = as_json(read_text("[0.100,0.250,0.400,0.750]"), (200, 100))
    assert spelled["boxes"] == [{"box": [20, 25, 80, 75], "score": None}] and spelled["candidates"] == []


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("the red star", "where is the red star?"),
        (" how many stars are there? ", "how many stars are there?"),
        ("Point at the star.", "Point at the star."),
    ],
)
def test_words_are_put_into_a_question_and_questions_are_left(text, asked):
    assert instruction(text) == asked


def test_what_is_no_instruction():
    assert instruction("{}", "find {}.") == "find {}."
    with pytest.raises(UserError, match="nothing is asked"):
        instruction("  \n")
    with pytest.raises(UserError, match="must hold"):
        instruction("star", "where?")


def test_an_answer_is_printed_drawn_and_written(ckpt, photo, tmp_path, capsys):
    files = ["--png", str(tmp_path / "new" / "a.png"), "--json", str(tmp_path / "a.json"), "--top", "2"]
    assert main(["ground", photo, "the star left of the ring", "--ckpt", ckpt, *files, "--max-new-tokens", "6"]) == 0
    told, printed = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    assert told["instruction"] == "where is the star left of the ring?" and told["instruction"] in printed
    assert len(told["candidates"]) == 4 and told["answer"].strip() in printed and "drawn: " in printed
    assert ("score" in printed) == bool(told["boxes"]) != ("points at nothing" in printed)
    assert Image.open(tmp_path / "new" / "a.png").size == (800, 400)


def test_masks_are_drawn_over_the_image_in_the_colours_of_their_boxes():
    image, half = Image.new("RGB", (200, 100), "navy"), torch.tensor([[1.0, -1.0], [1.0, -1.0]]).half()
    answer = GroundedAnswer("", [LEFT, RIGHT], FOUND, [1, 0], [0.8, 0.9], [half, -half])
    page, plain = draw_answer(image, answer, 0, masks=True), draw_answer(image, answer, 0)
    tints = [tuple((a + b) // 2 for a, b in zip(colour, (0, 0, 128), strict=True)) for colour in COLOURS[:2]]
    for x, tint in ((0.05, tints[0]), (0.95, tints[1])):
        (colour,) = pixel(page, x, 0.9)
        assert np.abs(np.subtract(colour, tint)).max() <= 1 and pixel(plain, x, 0.9) == {(0, 0, 128)}
    assert colours(draw_answer(image, GroundedAnswer("", [], []), 0, masks=True)) == {(0, 0, 128)}


def test_masks_are_written_as_run_lengths_at_the_size_of_the_image():
    half = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    answer = GroundedAnswer("<d1>", [LEFT], FOUND, [1], [0.8], [half])
    told = as_json(answer, (200, 100), masks=True)
    assert told["boxes"][0]["mask"] == {"size": [100, 200], "counts": [0, 100 * 100, 100 * 100]}
    assert "mask" not in as_json(answer, (200, 100))["boxes"][0]
    json.dumps(told)


def test_ground_with_masks(segmenting, photo, tmp_path, monkeypatch, capsys):
    from fromage.octopus import decoding

    asked = ["ground", photo, "the star", "--ckpt", segmenting, "--max-new-tokens", "2"]
    monkeypatch.setattr(decoding, "decode", lambda model, *_: [[model.tokenizer.trained_ids[2]]])
    assert main([*asked, "--mask", "--png", str(tmp_path / "a.png"), "--json"]) == 0
    (box,) = json.loads(capsys.readouterr().out)["boxes"]
    assert box["mask"]["size"] == [100, 200] and sum(box["mask"]["counts"]) == 20_000
    assert main([*asked, "--mask"]) == 0 and f"mask {sum(box['mask']['counts'][1::2])} pixels" in capsys.readouterr().out
    assert main([*asked, "--json"]) == 0 and "mask" not in json.loads(capsys.readouterr().out)["boxes"][0]


def test_masks_are_those_of_the_queries_pointed_at(segmenting, photo):
    model = load_octopus(segmenting)
    prompts = embed_prompts(model, [model.prompt(Image.open(photo), "where is the star?")], 4)
    prefill = read_batch(model, prompts, prompts.features)
    first = model.tokenizer.trained_ids[0]
    (answer,) = grounded(model, prefill, [[first + 3, first + 1]])
    for mask, query in zip(answer.masks, (3, 1), strict=True):
        torch.testing.assert_close(mask, prefill.found.masks[0, query].half())
    assert grounded(model, prefill, [[]])[0].masks == []


def test_without_a_checkpoint_the_toy_one_is_taken(ckpt, photo, monkeypatch, capsys):
    tour = SimpleNamespace(toy_checkpoint=lambda out: asked.append(out) or ckpt)
    asked = []
    monkeypatch.setitem(sys.modules, "fromage.apps.octopus_demo", tour)
    assert main(["ground", photo, "is there a star?", "--max-new-tokens", "2"]) == 0
    assert [str(out) for out in asked] == ["runs/octopus"] and "is there a star?" in capsys.readouterr().out


def test_the_web_demo_points_where_a_checkpoint_is_named_or_the_toy_is_trained(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = lambda octopus=None, **given: Opening(**given).octopus(octopus)  # noqa: E731
    assert opened(octopus=ckpt).num_queries == 4 and opened() is None, "nothing is trained for it"
    save_untrained(tmp_path / HOME / "stage3" / CHECKPOINT, num_queries=3)
    assert opened() is None, "its training did not come to the end"
    (tmp_path / HOME / "stage3" / FINISHED).touch()
    assert opened().num_queries == 3 and opened(octopus=ckpt).num_queries == 4 and opened(ckpt="own.ckpt") is None


def test_what_is_wrong_is_one_line(ckpt, photo, tmp_path, capsys):
    (tmp_path / "words.png").write_text("no image")
    torch.save({"state_dict": {}, "hyper_parameters": {"lm": "toy", "k": 1}}, tmp_path / "fromage.ckpt")
    for words, said in (
        ([str(tmp_path / "no.png"), "a star", "--ckpt", ckpt], "no.png: no such file"),
        ([str(tmp_path / "words.png"), "a star", "--ckpt", ckpt], "words.png: undecodable image"),
        ([photo, "  ", "--ckpt", ckpt], "nothing is asked"),
        ([photo, "a star", "--ckpt", ckpt, "--question", "where"], "must hold {} once"),
        ([photo, "a star", "--ckpt", str(tmp_path / "no.ckpt")], "no.ckpt: no such file"),
        ([photo, "a star", "--ckpt", str(tmp_path / "fromage.ckpt")], "is of FROMAGe, and not of Octopus"),
        ([photo, "star " * 600, "--ckpt", ckpt], "512 of the language model; shorten it"),
        ([photo, "a star", "--ckpt", ckpt, "--png", str(tmp_path)], "ends in .png"),
        ([photo, "a star", "--ckpt", ckpt, "--mask"], "last.ckpt has no masks; name the checkpoint of a training with"),
        (
            [photo, "a star", "--mask"],
            "the toy Octopus has no masks; name the checkpoint of a training with model.mask_scale",
        ),
    ):
        assert main(["ground", *words]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
        assert len(error) == 1 and error[0].startswith("fromage: ") and said in error[0]
