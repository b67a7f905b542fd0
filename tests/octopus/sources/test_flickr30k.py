"""Readers of Flickr30k Entities: phrases, and sentences with boxes in them."""

import re
from pathlib import Path

import pytest
from source_files import coco, entities

from fromage.data.tokenizer import PromptTokenizer
from fromage.errors import UserError
from fromage.models.frozen import TOY
from fromage.octopus.answers import answer_ids, read_indexed, read_text
from fromage.octopus.boxes import reading_order
from fromage.octopus.examples import Example
from fromage.octopus.sources import Flickr30kEntities, Flickr30kSpotting
from fromage.toy.scenes import PIXELS


@pytest.mark.parametrize("split", ["train", "val"])
def test_entities_of_the_toy_world_lie_where_refcoco_has_them(world, split):
    boxes = {e.image: e.boxes for e in coco(world, split=split)}
    source = entities(world, split=split)
    assert {e.image for e in source} == set(boxes) and len({e.key for e in source}) == len(source)
    assert source.dropped["phrases without a box"] == 2 * 5 * len(boxes)  # the ground and the time in each sentence
    several = 0
    for example in source:
        for box, there in zip(example.boxes, boxes[example.image], strict=True):
            assert box == pytest.approx(there, abs=0.51 / PIXELS)
        first = re.match(r"where is (\w+) .*\?", example.instruction)[1]
        assert len(example.answer) == {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}[first]
        several += len(example.answer) > 1
        pointed = [example.boxes[number] for number in example.answer]
        assert reading_order(pointed) == list(range(len(pointed)))
    assert several


SENTENCE = (
    "[/EN#1/people/other Two men] sit in [/EN#2/scene the yard] with [/EN#3/animals a dog] and [/EN#0/notvisual fun] ."
)
OBJECT = "<object>{names}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def annotate(folder: Path, *objects, size=(200, 100), said=SENTENCE, kind=Flickr30kEntities):
    """A reader of an image whose objects are (entities, xmin, ymin, xmax, ymax)."""
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "val.txt").write_text("12\n")
    (folder / "Sentences/12.txt").write_text(said + "\nNothing here .\n")
    named = ["".join(f"<name>{n}</name>" for n in names) for names, *_ in objects]
    listed = "".join(OBJECT.format(*sides, names=n) for n, (_, *sides) in zip(named, objects, strict=True))
    listed += "<object><name>2</name><scene>1</scene><nobndbox>0</nobndbox></object>"
    width, height = size
    sides = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    (folder / "Annotations/12.xml").write_text(f"<annotation><filename>12.jpg</filename>{sides}{listed}</annotation>")
    return kind(str(folder), "images", split="val")


def test_entities_as_published(tmp_path):
    source = annotate(tmp_path, ("1", 151, 1, 200, 100), ("3", 101, 51, 120, 60), ("15", 1, 1, 50, 100))
    men, dog = source
    assert (men.instruction, dog.instruction) == ("where is Two men?", "where is a dog?")
    assert men.boxes == dog.boxes == ((0.75, 0.0, 1.0, 1.0), (0.5, 0.5, 0.6, 0.6), (0.0, 0.0, 0.25, 1.0))
    assert men.answer == (2, 0) and dog.answer == (1,)  # in reading order
    assert men.image == str(Path("images", "12.jpg")) and source.dropped == {"phrases without a box": 2}


def test_entities_without_area(tmp_path):
    source = annotate(tmp_path, ("1", 151, 1, 200, 100), ("1", 300, 1, 310, 20), ("3", 180, 0, 999, 60))
    with pytest.warns(UserWarning, match="1 boxes of no area"):
        (dog,) = source
    assert dog.boxes[dog.answer[0]] == (179 / 200, 0.0, 1.0, 0.6)
    assert source.dropped["examples that point at such a box"] == 1


def test_entities_by_a_list_of_ids(world, tmp_path):
    chosen = (world / "flickr30k_entities/val.txt").read_text().split()[:2]
    (tmp_path / "mine.txt").write_text("\n".join(chosen))
    assert {Path(e.image).stem for e in entities(world, split=str(tmp_path / "mine.txt"))} == set(chosen)


def test_entities_that_are_wrong(world, tmp_path):
    with pytest.raises(UserError, match=r"tset\.txt: cannot be read.*its split"):
        list(entities(world, split="tset"))
    source = annotate(tmp_path, ("1", 1, 1, 5, 5))
    (tmp_path / "Annotations/12.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"1 of 1 entries.*12\.xml: is no XML, or broken in line 1, column 12"):
        list(source)
    with pytest.raises(UserError, match=r"12\.xml: size/width is 0"):
        list(annotate(tmp_path, ("1", 1, 1, 5, 5), size=(0, 100)))
    (tmp_path / "Annotations/12.xml").unlink()
    with pytest.raises(UserError, match=r"12\.xml: cannot be read.*Annotations"):
        list(Flickr30kEntities(str(tmp_path), "images", split="val"))
    with pytest.raises(UserError, match="holds no example, but 4 phrases without a box"):
        list(annotate(tmp_path))


# sentences with boxes


def spot(folder: Path, said: str, *objects) -> Flickr30kSpotting:
    return annotate(folder, *objects, said=said, kind=Flickr30kSpotting)


MEN, DOG = ("1", 151, 1, 200, 100), ("3", 101, 51, 120, 60)


def test_sentences_point_at_their_phrases_as_published(tmp_path):
    source = spot(tmp_path, SENTENCE, MEN, DOG, ("1", 1, 1, 50, 100))
    (example,) = source
    assert example.instruction == "Describe the image with positions." and example.key == "12.0"
    assert example.answer == ("Two men", 2, 0, " sit in the yard with a dog", 1, " and fun.")
    assert example.boxes == ((0.75, 0.0, 1.0, 1.0), (0.5, 0.5, 0.6, 0.6), (0.0, 0.0, 0.25, 1.0))
    assert source.dropped == {"sentences without a box": 1} and example.image == str(Path("images", "12.jpg"))


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("[/EN#3/animals A dog] , wet , chases [/EN#3/animals itself] !", ("A dog", 0, ", wet, chases itself", 0, "!")),
        ("[/EN#3/animals Dog]", ("Dog", 0)),
        ("( [/EN#3/animals A dog] ) is n't [/EN#1/people the man] 's .", ("(A dog", 0, ") isn't the man", 1, "'s.")),
        ("By [/EN#1/people men] [/EN#3/animals dogs] sit", ("By men", 1, " dogs", 0, " sit")),
        ("[/EN#7/other A tree] by [/EN#3/animals a dog] : 3.5 m", ("A tree by a dog", 0, ": 3.5 m")),
    ],
)
def test_sentences_as_people_write_them(tmp_path, said, answer):
    (example,) = spot(tmp_path, said, DOG, MEN)
    assert example.answer == answer and example.meant == tuple(dict.fromkeys(p for p in answer if isinstance(p, int)))


def test_sentences_with_a_box_that_has_no_area_are_left_out(tmp_path):
    source = spot(tmp_path, f"{SENTENCE}\n[/EN#3/animals A dog] sits .", ("1", 300, 1, 310, 20), MEN, DOG)
    with pytest.warns(UserWarning, match="1 boxes of no area"):
        (example,) = source
    assert example.answer == ("A dog", 1, " sits.") and source.dropped["examples that point at such a box"] == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_sentences_of_the_toy_world_name_all_objects(world, split):
    source = entities(world, Flickr30kSpotting, split=split, instruction="what is where?")
    boxes = {e.image: e.boxes for e in coco(world, split=split)}
    assert len(source) == 5 * len(boxes) and {e.instruction for e in source} == {"what is where?"}
    several = set()
    for example in source:
        assert sorted(example.meant) == list(range(len(boxes[example.image])))
        words, counts = [], []
        for piece in example.answer:
            if isinstance(piece, str):
                words.append(piece)
                counts.append(0)
            else:
                counts[-1] += 1
        assert re.fullmatch(r", on the \w+ (by|at) \w+\.", words.pop()) and counts.pop() == 0
        firsts = [re.sub("^ and ", "", text).split()[0] for text in words]
        assert counts == [{"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}[first] for first in firsts]
        assert "  " not in "".join(words)
        several.add(tuple(counts))
    assert any(len(counts) > 1 for counts in several) and any(max(counts) > 1 for counts in several)


@pytest.mark.parametrize("queries", [0, 4])
def test_sentences_read_back_from_their_tokens(queries):
    """As index tokens and as spelled boxes; the tokens of the words are those of the sentence without boxes."""
    tokenizer = PromptTokenizer(str(TOY / "opt"), [f"<d{n}>" for n in range(queries)])
    boxes = ((0.75, 0.0, 1.0, 1.0), (0.5, 0.5, 0.625, 0.625), (0.0, 0.0, 0.25, 1.0))
    example = Example("k", "a.jpg", "", ("two stars", 2, 0, " and a small ring", 1, ", on the sand."), boxes)
    *ids, end = answer_ids(example, tokenizer, queries)
    if queries:
        found = [boxes[number] for number in example.meant]
        answer = read_indexed(ids, tokenizer, [*found, (0.0, 0.0, 1.0, 1.0)], [1.0, 1.0, 1.0, 0.0])
        words = [token for token in ids if token not in tokenizer.trained_ids]
        assert words == tokenizer.encode("two stars and a small ring, on the sand.")
    else:
        answer = read_text(tokenizer.decode(ids))
    assert end == tokenizer.eos_id
    assert answer.pieces == [piece if isinstance(piece, str) else boxes[piece] for piece in example.answer]
    assert answer.words == "two stars and a small ring , on the sand."


def test_sentences_that_are_wrong(tmp_path):
    with pytest.raises(UserError, match="holds no example, but 2 sentences without a box"):
        list(spot(tmp_path, SENTENCE))
    (tmp_path / "Sentences/12.txt").unlink()
    with pytest.raises(UserError, match=r"12\.txt: cannot be read.*Sentences"):
        list(Flickr30kSpotting(str(tmp_path), "images", split="val"))
    with pytest.raises(UserError, match="limit"):
        Flickr30kSpotting(str(tmp_path), "images", limit=0)
