"""The reader of Visual Genome: regions, and objects by name."""

import json
from pathlib import Path

import pytest
from source_files import refs_of, write

from fromage.errors import UserError
from fromage.octopus.sources import VisualGenome
from fromage.toy.scenes import PIXELS, Scene

HOST = "https://cs.stanford.edu/people/rak248"
SIZES = {"width": 800, "height": 600, "flickr_id": None}
IMAGES = [
    {"url": f"{HOST}/VG_100K_2/1.jpg", "image_id": 1, "coco_id": None, **SIZES},
    {"url": f"{HOST}/VG_100K/51.jpg", "image_id": 51, "coco_id": 547168, **SIZES},
]


def region(phrase, x=400, y=60, width=80, height=120, **more) -> dict:
    return {"region_id": 1382, "width": width, "height": height, "image_id": 1, "phrase": phrase, "y": y, "x": x} | more


def thing(names, x=400, y=60, w=80, h=120) -> dict:
    return {"synsets": [f"{name}.n.01" for name in names], "h": h, "object_id": 1058498, "merged_object_ids": []} | {
        "names": names,
        "w": w,
        "y": y,
        "x": x,
    }


def genome(folder: Path, entries, images=IMAGES, name="region_descriptions", **options) -> VisualGenome:
    file, sizes = write(folder / f"{name}.json", entries), write(folder / "image_data.json", images)
    return VisualGenome(file, sizes, "images", **options)


def test_regions_as_published(tmp_path):
    regions = [region("the clock is green in colour"), region(" a cat on\n a table. ", x=-8, y=300, width=408, height=900)]
    clock, cat = genome(tmp_path, [{"regions": regions, "id": 1}])
    assert (clock.key, cat.key) == ("1.0", "1.1") and clock.image == cat.image == str(Path("images", "VG_100K_2", "1.jpg"))
    assert clock.instruction == "where is the clock is green in colour?" and cat.instruction == "where is a cat on a table?"
    assert clock.boxes == cat.boxes == ((0.5, 0.1, 0.6, 0.3), (0.0, 0.5, 0.5, 1.0))  # clipped to the image
    assert clock.boxes is cat.boxes and (clock.answer, cat.answer) == ((0,), (1,))


def test_regions_of_the_first_version(tmp_path):
    (one,) = genome(tmp_path, [{"regions": [region("a cat")], "image_id": 51}], [{"id": 51, **IMAGES[1], "image_id": 51}])
    assert one.image == str(Path("images", "VG_100K", "51.jpg"))
    sizes = [{("id" if name == "image_id" else name): value for name, value in IMAGES[0].items()}]
    assert len(genome(tmp_path, [{"regions": [region("a cat")], "id": 1}], sizes)) == 1


def test_objects_of_one_name_are_one_answer(tmp_path):
    things = [thing(["window"], x=600), thing(["clock", "big clock"]), thing(["window"], x=0), thing([])]
    source = genome(tmp_path, [{"image_id": 1, "objects": things}], name="objects", question="point at {}")
    assert [(e.instruction, e.answer) for e in source] == [("point at window", (2, 0)), ("point at clock", (1,))]
    assert len(next(iter(source)).boxes) == 4 and source.dropped == {"descriptions without words": 1}


def test_boxes_of_no_area_and_empty_descriptions(tmp_path):
    regions = [region("far away", x=900), region("a cat"), region(" . "), region("flat", height=0)]
    source = genome(tmp_path, [{"regions": regions, "id": 1}])
    with pytest.warns(UserWarning, match=r"region_descriptions\.json: left out are 2 boxes of no area in their image"):
        (cat,) = source
    assert cat.key == "1.1" and cat.answer == (0,) and len(cat.boxes) == 2
    assert source.dropped["examples that point at such a box"] == 2 and source.dropped["descriptions without words"] == 1


def test_some_of_each_image_and_some_in_all(tmp_path):
    regions = [{"regions": [region(f"cat {n}") for n in range(5)], "id": number} for number in (1, 51)]
    assert [e.key for e in genome(tmp_path, regions, per_image=2)] == ["1.0", "1.1", "51.0", "51.1"]
    assert [e.key for e in genome(tmp_path, regions, limit=6)] == ["1.0", "1.1", "1.2", "1.3", "1.4", "51.0"]
    for options in ({"per_image": 0}, {"limit": 0}, {"question": "where?"}):
        with pytest.raises(UserError, match=next(iter(options))):
            genome(tmp_path, regions, **options)


def test_cocos_images_that_are_tested_on_are_held_out(tmp_path):
    regions = [{"regions": [region("a cat")], "id": number} for number in (1, 51)]
    note = {"id": 1, "image_id": 547168, "category_id": 1}
    for split, there in (("testB", ["1.0"]), ("train", ["1.0", "51.0"])):
        refs = refs_of(tmp_path / f"{split}.p", [note], split=split)
        source = genome(tmp_path, regions, apart_from=[refs])
        assert [e.key for e in source] == there and source.dropped["images that are held out"] == 2 - len(there)


def test_odd_entries_cost_no_more_than_themselves(tmp_path):
    regions = [region(f"cat {n}") for n in range(40)]
    regions[3] = region("cat", x=None)
    source = genome(tmp_path, [{"regions": regions, "id": 1}, *[{"regions": [region("a cat")], "id": 51}] * 20])
    with pytest.warns(
        UserWarning, match=r"1 of 60 entries are odd \(regions\[3\] of image 1\.x is null, not a number\) and left"
    ):
        assert len(source) == 59
    assert source.dropped == {"odd entries": 1}


@pytest.mark.parametrize(
    ("entries", "images", "why"),
    [
        (
            [{"regions": [region("a cat")], "id": 2}],
            IMAGES,
            r"1 of 1 entries are odd \(image 2 is not in .*image_data\.json\)",
        ),
        ([{"regions": [region("a cat")]}], IMAGES, r"entries\[0\]\.image_id is null, not a whole number"),
        ([{"regions": {"a": 1}, "id": 1}, {"regions": []}], IMAGES, r"entries\[0\]\.regions is an object, not a list"),
        ([{"regions": [region("cat")] * 3 + [5], "id": 1}], IMAGES, r"regions\[3\] of image 1 is 5, not an object"),
        ([{"regions": [], "id": 1}], IMAGES, "holds no example; name another"),
        (
            [{"regions": [region("a cat")], "id": 1}],
            [IMAGES[0] | {"url": "https://a.b/1.png"}],
            r"url is the text .*VG_100K_2/ID",
        ),
        ([{"regions": [region("a cat")], "id": 1}], [IMAGES[0] | {"url": f"VG_100K/{'1' * 300}.jpg"}], "url is the text"),
        ([{"regions": [region("a cat")], "id": 1}], [IMAGES[0] | {"width": 0}], "width is 0, not a number of pixels"),
        ([{"regions": [region("a cat")], "id": 1}], [{"a": 1}], "of no known kind, and not images of Visual Genome"),
        (
            [{"conversations": [{"from": "human"}]}],
            IMAGES,
            "is instructions of LLaVA, and not regions .* or objects of Visual",
        ),
    ],
)
def test_files_that_are_wrong(tmp_path, entries, images, why):
    with pytest.raises(UserError, match=why):
        list(genome(tmp_path, entries, images))


def test_missing_files(tmp_path):
    genome(tmp_path, [{"regions": [region("a cat")], "id": 1}])
    regions, images = str(tmp_path / "region_descriptions.json"), str(tmp_path / "image_data.json")
    with pytest.raises(UserError, match=r"gone\.json: cannot be read .*region_descriptions"):
        list(VisualGenome(str(tmp_path / "gone.json"), images, "images"))
    with pytest.raises(UserError, match=r"gone\.json: cannot be read .*image_data"):
        list(VisualGenome(regions, str(tmp_path / "gone.json"), "images"))


@pytest.mark.parametrize("name", ["region_descriptions", "objects"])
def test_the_toy_worlds_regions_lie_where_things_are_drawn(world, name):
    folder = world / "visual_genome"
    entries = json.loads((folder / "image_data.json").read_text())
    scenes = {int(entry["image_id"]): Scene.parse(entry["scene"]) for entry in entries}
    source = VisualGenome(str(folder / f"{name}.json"), str(folder / "image_data.json"), str(folder))
    assert {int(e.key.split(".")[0]) for e in source} == set(scenes) and len({e.key for e in source}) == len(source)
    for example in source:
        things = scenes[int(example.key.split(".")[0])].things
        assert Path(example.image).is_file() and len(example.boxes) == len(things)
        assert all(0.05 < side * PIXELS < PIXELS for box in example.boxes for side in box)
        if name == "objects":
            shape = example.instruction.removeprefix("where is ").removesuffix("?")
            assert len(example.answer) == sum(thing.shape == shape for thing in things)
        else:
            assert len(example.answer) == 1
