"""The published files: what the readers make of them, and what they refuse."""

import json
import shutil
import warnings

import pytest

from fromage.cli.eval_options import ImageOptions
from fromage.data.annotation_formats import coco_captions, format_of
from fromage.data.annotations import DIGITS, ID, TEXT, WHOLE, fitting, odd_allowed, problem
from fromage.errors import UserError
from fromage.evals.caption_sets import read_caption_set
from fromage.evals.dialogues import read_dialogues, spoken
from fromage.evals.vist import read_stories


def paths(world):
    coco, vist, visdial, composed = (world / name for name in ("coco", "vist", "visdial", "composed"))
    return {
        "captions of COCO": coco / "annotations" / "captions_val2017.json",
        "boxes of COCO": world / "refcoco" / "instances.json",
        "Karpathy's split of Flickr30k": world / "flickr30k" / "dataset_flickr30k.json",
        "stories in sequence of VIST": vist / "sis" / "val.story-in-sequence.json",
        "dialogues of VisDial 1.0 with candidates": visdial / "visdial_1.0_val.json",
        "dialogues of VisDial 1.0 without candidates": visdial / "visdial_1.0_train.json",
        "dense annotations of VisDial 1.0": visdial / "visdial_1.0_val_dense_annotations.json",
        "composed queries of CIRCO": composed / "circo" / "annotations" / "val.json",
        "images of COCO": composed / "circo" / "annotations" / "image_info_unlabeled2017.json",
        "composed queries of CIRR": composed / "cirr" / "captions" / "cap.rc2.val.json",
        "an image split of CIRR": composed / "cirr" / "image_splits" / "split.rc2.val.json",
        "dialogues of ChatIR": composed / "chatir" / "VisDial_v1.0_queries_val.json",
        "a list of images": composed / "chatir" / "Search_Space_val_50k.json",
    }


def read(dataset, world, path):
    if dataset == "vist":
        return read_stories(path, world / "vist" / "images" / "val")
    if dataset == "visdial":
        dense = world / "visdial" / "visdial_1.0_val_dense_annotations.json"
        return read_dialogues(path, dense, world / "visdial" / "images" / "val")
    return read_caption_set(path, world / "coco" / "val2017", dataset)


def test_files_are_told_apart(world):
    for kind, path in paths(world).items():
        assert format_of(json.loads(path.read_text())) == kind


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


ODD = {
    "captions of COCO": [
        ("annotations", {"image_id": 3}, r"annotations\[7\] lacks caption"),
        ("annotations", {"image_id": 3, "caption": None}, r"annotations\[7\]\.caption is null, not a text"),
        ("annotations", {"image_id": 3, "caption": ["a"]}, r"annotations\[7\]\.caption is a list, not a text"),
        ("annotations", {"image_id": 3, "caption": "half \ud83d"}, r"half a character, not a text"),
        ("annotations", {"image_id": [], "caption": "a"}, r"image_id is a list of nothing, not a number or text"),
        ("annotations", {"image_id": -5, "caption": "a"}, r"annotations of image -5, which is missing"),
        ("annotations", "a", r"annotations\[7\] is the text 'a', not an object with image_id, caption"),
        ("images", {"id": 10**9, "file_name": None}, r"images\[7\]\.file_name is null, not a file name"),
        ("images", {"id": 10**9, "file_name": "a\0.jpg"}, r"not a file name"),
    ],
    "stories in sequence of VIST": [
        ("annotations", [], r"annotations\[7\] is a list of 0, not of 1"),
        ("annotations", [{"text": "a", "photo_flickr_id": "1", "story_id": "1", "worker_arranged_photo_order": "first"}],
         r"worker_arranged_photo_order is the text 'first', not a whole number"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "where", "entry", "said"), [(k, *case) for k, cases in ODD.items() for case in cases])
def test_a_single_odd_entry_is_told_and_left_out_and_many_refuse_the_file(world, tmp_path, kind, where, entry, said):
    content = json.loads(paths(world)[kind].read_text())
    path, dataset = tmp_path / "a.json", {"c": "coco", "s": "vist"}[kind[0]]
    if (where == "annotations" and dataset == "coco") or dataset == "vist":
        content[where][7] = entry
    else:
        content[where].insert(7, entry)
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=rf"a\.json: 1 of \d+ entries are odd \(.*{said}.*\) and left out"):
        assert read(dataset, world, path)
    content[where] = [content[where][0], *[entry] * 10, *content[where][1:50]]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"a\.json: \d+ of \d+ entries are odd .*fetch the file again"):
        read(dataset, world, path)
    with odd_allowed(0.5), pytest.warns(UserWarning, match="and left out"):
        assert read(dataset, world, path)
    with odd_allowed(0.01), pytest.raises(UserError, match="allow more by --max-lost"):
        read(dataset, world, path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("gt_index", 100, "names another answer"),
        ("gt_index", None, r"dialog\[3\]\.gt_index is null, not a whole number"),
        ("question", 10**6, r"question is 1000000, not a whole number below"),
        ("answer_options", "all", r"answer_options is the text 'all', not a list"),
    ],
)
def test_a_dialogue_that_is_odd(world, tmp_path, field, value, said):
    content = json.loads(paths(world)["dialogues of VisDial 1.0 with candidates"].read_text())
    content["data"]["dialogs"][1]["dialog"][3][field] = value
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"a\.json: .*{said}"):
        warnings.simplefilter("error")
        try:
            read("visdial", world, path)
        except UserWarning as warning:
            raise UserError(*warning.args) from warning


@pytest.mark.parametrize("name", ["questions", "answers", "dialogs"])
def test_parts_of_visdial_that_are_no_lists(world, tmp_path, name):
    content = json.loads(paths(world)["dialogues of VisDial 1.0 with candidates"].read_text())
    content["data"][name] = [content["data"][name][0], 3 if name == "dialogs" else None]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"a\.json: .*data\.{name}\[1\] is (null|3), not"):
        read("visdial", world, tmp_path / "a.json")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b'{"a": 1,}', "broken in line 1, column 9"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"images": [' + b"9" * 5000 + b"]}", "too many digits"),
        (b'{"a":\n"caf\xe9"}', "line 2 is not UTF-8; save the file as UTF-8"),
        ("{}".encode("utf-16-le"), "null bytes, as UTF-16 without a byte order mark"),
    ],
)
def test_what_is_no_json_is_told_in_words(tmp_path, data, said):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.json: .*{said}"):
        read("coco", tmp_path, tmp_path / "a.json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_json_of_any_unicode_encoding(world, tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_text(paths(world)["captions of COCO"].read_text(), encoding=encoding)
    assert read("coco", world, path).captions == read("coco", world, paths(world)["captions of COCO"]).captions


def test_the_coco_sample(shared_data):
    sample = shared_data / "coco_sample"
    data = read_caption_set(sample / "captions_val2017_sample.json", sample / "val2017")
    content = json.loads((sample / "captions_val2017_sample.json").read_text())
    said = {image["id"]: [] for image in content["images"]}
    for note in content["annotations"]:
        said[note["image_id"]].append(note["caption"].strip())
    assert len(data.images) == 128 and all(path.is_file() for path in data.images)
    assert data.captions == [texts[:5] for texts in said.values()]
    assert sum(map(len, data.captions)) + data.dropped["captions beyond the fifth"] == 641
    whole = read_caption_set(sample / "captions_val2017.json", sample / "val2017")
    assert len(whole.images) == 5000 and sum(map(len, whole.captions)) == 25_000


def test_karpathy_splits(world, tmp_path):
    """Both published layouts: COCO's names a folder for each image, Flickr30k's does not."""
    flickr = read_caption_set(
        paths(world)["Karpathy's split of Flickr30k"], world / "flickr30k" / "flickr30k-images", "flickr30k"
    )
    assert len(flickr.images) == 60 and {len(texts) for texts in flickr.captions} == {5}
    assert all(path.is_file() for path in flickr.images)
    with pytest.raises(UserError, match="split val"):
        read_caption_set(paths(world)["Karpathy's split of Flickr30k"], tmp_path, "flickr30k", "val")
    entry = {"filepath": "val2014", "filename": "a.jpg", "sentences": [{"raw": f"text {n}"} for n in range(6)]}
    images = [entry | {"split": split} for split in ("test", "restval", "train", "val")]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    found = [read_caption_set(tmp_path / "dataset_coco.json", tmp_path, "coco", split) for split in ("test", "train", "val")]
    assert [len(data.images) for data in found] == [1, 2, 1] and found[0].dropped["captions beyond the fifth"] == 1
    assert found[0].images == [tmp_path / "val2014" / "a.jpg"]
    (tmp_path / "a.jpg").touch()
    assert read_caption_set(tmp_path / "dataset_coco.json", tmp_path, "coco").images == [tmp_path / "a.jpg"]


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
        data = read_caption_set(path, tmp_path, "flickr30k" if "dataset" in content else "coco")
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
    assert found.other == 1 and len(found.images) == 24
    assert [story.told(filed=False) for story in found.stories] == want.stories[:4][::-1]
    assert found.stories[0].told(filed=True).sentences == want.stories[3].sentences[::-1]
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
    cases = [({"gt_relevance": [1] * 99}, "not of its candidates"), ({"round_id": 11}, "not of its candidates")]
    cases += [
        ({"round_id": "x"}, r"are odd \(ratings\[0\]\.round_id"),
        ({"gt_relevance": ["x"] * 100}, "not a number"),
    ]
    for broken, said in cases:
        (tmp_path / "dense.json").write_text(json.dumps([ratings[0] | broken, *ratings[1:]][:5]))
        with pytest.raises(UserError, match=rf"dense\.json: .*{said}"):
            read_dialogues(path, tmp_path / "dense.json", world, limit=5)


def test_images_that_share_an_id_are_refused_and_the_same_entry_twice_is_not(tmp_path):
    """As in files put together, where captions would go to the wrong image."""
    file, one = tmp_path / "captions.json", {"id": 1, "file_name": "a.png"}
    notes = [{"image_id": 1, "caption": "a dog"}, {"image_id": 1, "caption": "a cat"}]
    file.write_text(json.dumps({"images": [one, {"id": 1, "file_name": "b.png"}], "annotations": notes}))
    with pytest.raises(UserError, match=r"1 of 2 entries are odd \(images of the id 1, which several have\)"):
        coco_captions(file, json.loads(file.read_text()))
    with odd_allowed(1.0), pytest.warns(UserWarning, match="left out"):
        assert not coco_captions(file, json.loads(file.read_text())).captions
    assert coco_captions(file, {"images": [one, one], "annotations": notes}).captions == {1: ["a dog", "a cat"]}


def test_numbers_without_bound_are_odd():
    for kind in (WHOLE, ID, DIGITS):
        assert problem(10**400, kind) == f" is a number that is too large, not {kind.name}" and not problem(7, kind)
    assert problem("9" * 5000, DIGITS) and not problem("12", DIGITS)


def test_entries_that_are_left_out_are_counted_in_the_report(tmp_path):
    options = ImageOptions(ckpt="none", images=tmp_path, max_lost=0.5)
    with options.reading(), pytest.warns(UserWarning, match="1 of 3 entries are odd"):
        assert fitting(tmp_path / "a.json", "images", ["a", None, "b"], TEXT) == ["a", "b"]
    report = {"evaluation": "e", "data": "d", "headline": [], "skipped": {"images missing": 0}, "protocol": {}, "paper": {}}
    assert options.told(report).data["skipped"] == {"images missing": 0, "odd entries": 1}
    assert ImageOptions(ckpt="none", images=tmp_path).told(report).data["skipped"] == {"images missing": 0}
