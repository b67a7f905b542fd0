"""The reader of LLaVA's instructions."""

import json
from pathlib import Path

import pytest
from PIL import Image
from source_files import write

from fromage.checkpoints.safe_pickle import load_plain
from fromage.errors import UserError
from fromage.octopus.boxes import reading_order, spelled
from fromage.octopus.examples import conversations
from fromage.octopus.sources import Instructions


@pytest.mark.parametrize("split", ["train", "val"])
def test_instructions_of_the_toy_world(world, split):
    file = world / f"llava/instruct_{split}.json"
    found = list(Instructions(str(file), str(world)))
    lines = [turn["value"] for entry in json.loads(file.read_text()) for turn in entry["conversations"]]
    assert len(found) == len(lines) / 2 == len({e.key for e in found})
    for example, asked, told in zip(found, lines[::2], lines[1::2], strict=True):
        assert "<image>" not in example.instruction and example.instruction in asked
        texts = [piece if isinstance(piece, str) else spelled(example.boxes[piece]) for piece in example.answer]
        assert "".join(texts) == told
        assert sorted(example.meant) == list(range(len(example.boxes)))
        assert Path(example.image).is_file()
        pointed = [example.boxes[number] for number in example.answer if isinstance(number, int)]
        assert reading_order(pointed) == list(range(len(pointed)))
    assert max(len(e.boxes) for e in found) > 1
    assert len(Instructions(str(world / f"llava/pretrain_{split}.json"), str(world))) > len({e.image for e in found})


def talk(*turns, image="a.jpg", **more) -> dict:
    lines = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=False)]
    return {"id": "x", "image": image, "conversations": lines} | more


def instructions(folder: Path, *entries, **options) -> Instructions:
    return Instructions(write(folder / "talks.json", list(entries)), str(folder), **options)


def test_the_turns_of_a_conversation_belong_together(tmp_path):
    entries = [talk(("a?", "b"), ("c?", "at [0.1, 0.2, 0.3, 0.4]"), ("d?", "e")), talk(("a?", "b"))]
    rows = [[turn.instruction for turn in turns] for turns in conversations(instructions(tmp_path, *entries))]
    assert rows == [["a?", "c?"], ["d?"], ["a?"]]  # cut after an answer with a box, and between conversations


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A cat [0.1, 0.2, 0.3, 0.4].", ("A cat ", 0, ".")),
        ("[0.100,0.200,0.300,0.400]", (0,)),
        ("[0.5,0.2,0.6,0.4;0.1,0.2,0.3,0.4]", (0, 1)),
        ("a [0.1,0.2,0.3,0.4] on b [0.0,0.0,1.0,1.0], so a [0.1,0.2,0.3,0.4]", ("a ", 0, " on b ", 1, ", so a ", 0)),
        ("the list [1, 2, 3, 4] and [0.1, 0.2] stay", ("the list [1, 2, 3, 4] and [0.1, 0.2] stay",)),
    ],
)
def test_boxes_in_answers_become_numbers(tmp_path, text, answer):
    (example,) = instructions(tmp_path, talk(("where? [0.1,0.2,0.3,0.4]\n<image>", f" {text} ")))
    assert example.answer == answer
    assert example.instruction == "where? [0.1,0.2,0.3,0.4]"
    if 0 in answer:
        assert (0.1, 0.2, 0.3, 0.4) in example.boxes
    assert len(example.boxes) == len({piece for piece in answer if isinstance(piece, int)})


def test_turns_are_examples_of_their_own(tmp_path):
    entries = [talk(("<image>\nfirst?", "one"), ("second?", "two")), talk(("<image>\nthird?", "three"))]
    found = list(instructions(tmp_path, *entries))  # both entries have the id x, as some of LLaVA's have
    assert [e.instruction for e in found] == ["first?", "second?", "third?"] and len({e.key for e in found}) == 3


def test_what_is_no_instruction_about_an_image_is_counted(tmp_path):
    text_only = {"id": "t", "conversations": talk(("hello?", "hi"))["conversations"]}
    odd = talk(("<image>\nwhat?", "this"), ("and?",))
    swapped = {"id": "s", "image": "a.jpg", "conversations": talk(("q", "a"))["conversations"][::-1]}
    pixels = talk(("where?", "[12.0,30.5,50.0,60.0]"), ("really?", "yes"))
    source = instructions(tmp_path, text_only, talk(("q", "a"), image=["a.jpg", "b.jpg"]), odd, swapped, pixels)
    with pytest.warns(UserWarning, match="left out are"):
        assert [e.instruction for e in source] == ["what?", "really?"]
    assert source.dropped == {
        "entries without an image, or of several": 2,
        "turns that are no question and answer": 2,
        "boxes of no area in their image": 1,
        "examples that point at such a box": 1,
    }


def test_boxes_of_the_padded_image(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg")  # padded by 50 pixels above and below
    entry = talk(("where?", "[0.25,0.25,0.5,0.5] [0.25,0.1,0.5,0.5]"))
    (plain,), (padded,) = instructions(tmp_path, entry), instructions(tmp_path, entry, padded=True)
    assert plain.boxes[0] == (0.25, 0.25, 0.5, 0.5)
    assert padded.boxes[0] == (0.25, 0.0, 0.5, 0.5) and padded.answer == (0, " ", 0)  # what lay in the margin is cut off


def test_boxes_in_questions_are_of_the_image_itself_too(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg")
    entry = talk(
        ("what is in [0.000,0.250,1.000,0.750;0.000,0.250,0.500,0.500]?", "it"), ("and in [0.1,0.0,0.2,0.1]?", "nothing")
    )
    with pytest.warns(UserWarning, match="left out are"):
        (whole,) = instructions(tmp_path, entry, padded=True)
    plain = instructions(tmp_path, entry)
    assert whole.instruction == "what is in [0.000,0.000,1.000,1.000;0.000,0.000,0.500,0.500]?"
    assert [each.instruction for each in plain][1] == "and in [0.1,0.0,0.2,0.1]?"


def test_images_that_evaluations_look_at_are_left_out(world, tmp_path):
    refs = load_plain(world / "refcoco" / "refs(unc).p")
    barred = next(ref["image_id"] for ref in refs if ref["split"] == "val")
    names = [f"coco/train2017/{barred:012d}.jpg", f"COCO_train2014_{barred:012d}.jpg", f"vg/{barred}.jpg", "000.jpg"]
    entries = [{"image": name, "conversations": talk(("what?", "it"))["conversations"]} for name in names]
    (tmp_path / "some.json").write_text(json.dumps(entries))
    source = Instructions(str(tmp_path / "some.json"), "i", apart_from=[str(world / "refcoco" / "refs(unc).p")])
    assert [Path(each.image).name for each in source] == [f"{barred}.jpg", "000.jpg"]
    assert source.dropped["images that are held out"] == 2


def test_instructions_that_are_wrong(world, tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: cannot be read"):
        list(Instructions(str(tmp_path / "gone.json"), "images"))
    with pytest.raises(UserError, match="is boxes of COCO, and not instructions of LLaVA"):
        list(Instructions(str(world / "refcoco/instances.json"), "images"))
    with pytest.raises(UserError, match=r"talks\.json: 1 of 2 entries are odd \(entries\[1\] lacks conversations"):
        list(instructions(tmp_path, talk(("q", "a")), {"image": "a.jpg"}))
    with pytest.raises(UserError, match="holds no example, but 1 entries without an image"):
        list(instructions(tmp_path, talk(("q", "a"), image=None)))
