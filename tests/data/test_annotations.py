"""The published files: what the readers make of them, and what they refuse."""

import json
import shutil

import pytest

from fromage.data.annotations import kind_of
from fromage.errors import UserError
from fromage.evals.caption_sets import read_captions
from fromage.evals.dialogues import read_dialogues, spoken
from fromage.evals.vist import read_stories


def paths(world):
    coco, vist, visdial = world / "coco", world / "vist", world / "visdial"
    return {
        "captions of COCO": coco / "annotations" / "captions_val2017.json",
        "boxes of COCO": world / "refcoco" / "instances.json",
        "Karpathy's split of Flickr30k": world / "flickr30k" / "dataset_flickr30k.json",
        "stories in sequence of VIST": vist / "sis" / "val.story-in-sequence.json",
        "dialogues of VisDial 1.0 with candidates": visdial / "visdial_1.0_val.json",
        "dialogues of VisDial 1.0 without candidates": visdial / "visdial_1.0_train.json",
        "dense annotations of VisDial 1.0": visdial / "visdial_1.0_val_dense_annotations.json",
    }


def read(dataset, world, path):
    if dataset == "vist":
        return read_stories(path, world / "vist" / "images" / "val")
    if dataset == "visdial":
        dense = world / "visdial" / "visdial_1.0_val_dense_annotations.json"
        return read_dialogues(path, dense, world / "visdial" / "images" / "val")
    return read_captions(path, world / "coco" / "val2017", dataset)


def test_files_are_told_apart(world):
    for kind, path in paths(world).items():
        assert kind_of(json.loads(path.read_text())) == kind


@pytest.mark.parametrize(
    ("dataset", "good"),
    [
        ("coco", "captions of COCO"),
        ("flickr30k", "Karpathy's split of Flickr30k"),
        ("vist", "stories in sequence of VIST"),
        ("visdial", "dialogues of VisDial 1.0 with candidates"),
    ],
)
def test_each_reader_takes_its_own_files_and_says_what_the_others_are(world, dataset, good):
    for kind, path in paths(world).items():
        if kind == good:
            read(dataset, world, path)
        else:
            with pytest.raises(UserError, match=f"is {kind}.*name "):
                read(dataset, world, path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"images": [], "annotations": []}', "3"])
def test_what_is_no_annotation_file(world, tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    for dataset in ("coco", "flickr30k", "vist", "visdial"):
        with pytest.raises(UserError, match=r"a\.json"):
            read(dataset, world, path)
        with pytest.raises(UserError, match=r"none\.json.*cannot be read"):
            read(dataset, world, tmp_path / "none.json")


def test_another_version_of_visdial_is_named(world, tmp_path):
    content = json.loads(paths(world)["dialogues of VisDial 1.0 with candidates"].read_text())
    path = tmp_path / "visdial_0.9_val.json"
    path.write_text(json.dumps(content | {"version": "0.9"}))
    with pytest.raises(UserError, match="another version of VisDial"):
        read("visdial", world, path)


@pytest.mark.parametrize(
    "kind", ["captions of COCO", "stories in sequence of VIST", "dialogues of VisDial 1.0 with candidates"]
)
def test_an_entry_that_is_broken_further_down(world, tmp_path, kind):
    content = json.loads(paths(world)[kind].read_text())
    if "data" in content:
        content["data"]["dialogs"][1]["dialog"][3]["gt_index"] = 100
    else:
        content["annotations"][7] = content["annotations"][7][:0] if "stories" in kind else {"id": 3}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    dataset = {"c": "coco", "s": "vist", "d": "visdial"}[kind[0]]
    with pytest.raises(UserError, match=r"a\.json: an entry is broken"):
        read(dataset, world, path)


def test_the_coco_sample(shared_data):
    sample = shared_data / "coco_sample"
    data = read_captions(sample / "captions_val2017_sample.json", sample / "val2017")
    content = json.loads((sample / "captions_val2017_sample.json").read_text())
    said = {image["id"]: [] for image in content["images"]}
    for note in content["annotations"]:
        said[note["image_id"]].append(note["caption"].strip())
    assert len(data.images) == 128 and all(path.is_file() for path in data.images)
    assert data.captions == [texts[:5] for texts in said.values()]
    assert sum(map(len, data.captions)) + data.dropped["captions beyond the fifth"] == 641
    whole = read_captions(sample / "captions_val2017.json", sample / "val2017")
    assert len(whole.images) == 5000 and sum(map(len, whole.captions)) == 25_000


def test_karpathy_splits(world, tmp_path):
    """Both published layouts: COCO's names a folder for each image, Flickr30k's does not."""
    flickr = read_captions(
        paths(world)["Karpathy's split of Flickr30k"], world / "flickr30k" / "flickr30k-images", "flickr30k"
    )
    assert len(flickr.images) == 60 and {len(texts) for texts in flickr.captions} == {5}
    assert all(path.is_file() for path in flickr.images)
    with pytest.raises(UserError, match="split val"):
        read_captions(paths(world)["Karpathy's split of Flickr30k"], tmp_path, "flickr30k", "val")
    entry = {"filepath": "val2014", "filename": "a.jpg", "sentences": [{"raw": f"text {n}"} for n in range(6)]}
    images = [entry | {"split": split} for split in ("test", "restval", "train", "val")]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    found = [read_captions(tmp_path / "dataset_coco.json", tmp_path, "coco", split) for split in ("test", "train", "val")]
    assert [len(data.images) for data in found] == [1, 2, 1] and found[0].dropped["captions beyond the fifth"] == 1
    assert found[0].images == [tmp_path / "val2014" / "a.jpg"]
    (tmp_path / "a.jpg").touch()
    assert read_captions(tmp_path / "dataset_coco.json", tmp_path, "coco").images == [tmp_path / "a.jpg"]


def test_blank_captions_are_none_in_either_layout(tmp_path):
    path, texts = tmp_path / "a.json", (" ", "a star ", "")
    images = [{"filename": f"{i}.jpg", "split": "test", "sentences": [{"raw": texts[j]} for j in which]}
              for i, which in enumerate([(0, 1), (0, 2)])]  # fmt: skip
    for content in (
        {"dataset": "flickr30k", "images": images},
        {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in (0, 1)],
         "annotations": [{"image_id": i, "caption": texts[j]} for i, j in ((0, 0), (0, 1), (1, 0), (1, 2))]},
    ):  # fmt: skip
        path.write_text(json.dumps(content))
        data = read_captions(path, tmp_path, "flickr30k" if "dataset" in content else "coco")
        assert data.captions == [["a star"]] and data.dropped["images without a caption"] == 1


def test_stories_are_in_the_order_of_the_photos_and_others_are_counted(world, tmp_path):
    path = paths(world)["stories in sequence of VIST"]
    content = json.loads(path.read_text())
    images = world / "vist" / "images" / "val"
    want = read_stories(path, images)
    assert len(want.stories) == 5 and len(want.images) == 25 and want.other == 0
    assert want.stories[0].sentences == [notes[0]["text"] for notes in content["annotations"][:5]]
    content["annotations"] = content["annotations"][::-1][1:]  # backwards, and the last story loses its last image
    shuffled = tmp_path / "val.story-in-sequence.json"
    shuffled.write_text(json.dumps(content))
    found = read_stories(shuffled, images)
    assert found.other == 1 and found.stories == want.stories[:4][::-1] and len(found.images) == 24
    shutil.copy(images / "1.jpg", tmp_path / "1.PNG")
    assert len(read_stories(path, images, limit=2).stories) == 2


def test_dialogues(world):
    data = read("visdial", world, paths(world)["dialogues of VisDial 1.0 with candidates"])
    ratings = json.loads(paths(world)["dense annotations of VisDial 1.0"].read_text())
    assert len(data.dialogues) == 5 and all(talk.image.is_file() for talk in data.dialogues)
    for talk, note in zip(data.dialogues, ratings, strict=True):
        assert talk.rated == note["round_id"] - 1 and len(talk.rounds) == 10
        assert talk.relevance[talk.rounds[talk.rated].right] == 1, "the answer itself is right"
    first = data.dialogues[0].rounds[0]
    assert first.question.endswith("?") and not first.question.endswith("??")
    assert spoken([first]) == f"Q: {first.question} A: {first.answer}." and spoken([]) == ""


def test_ratings_of_other_dialogues(world, tmp_path):
    ratings = json.loads(paths(world)["dense annotations of VisDial 1.0"].read_text())
    (tmp_path / "dense.json").write_text(json.dumps(ratings[:-1]))
    path = paths(world)["dialogues of VisDial 1.0 with candidates"]
    with pytest.raises(UserError, match="of one split"):
        read_dialogues(path, tmp_path / "dense.json", world)
    for broken in ({"gt_relevance": [1] * 99}, {"round_id": 11}, {"round_id": "x"}, {"gt_relevance": ["x"] * 100}):
        (tmp_path / "dense.json").write_text(json.dumps([ratings[0] | broken, *ratings[1:]]))
        with pytest.raises(UserError, match=r"dense\.json: an entry is broken"):
            read_dialogues(path, tmp_path / "dense.json", world)
