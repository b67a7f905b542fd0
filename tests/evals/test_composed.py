"""Composed retrieval: figures by the published evaluations' rules, files for servers, what is refused."""

import itertools
import json
import shutil
import statistics

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fromage.errors import UserError
from fromage.evals import base, circo, cirr, fashion_iq, genecis
from fromage.evals.circo import read_circo
from fromage.evals.cirr import read_cirr
from fromage.evals.composed import Composed, ComposedSet
from fromage.evals.fashion_iq import read_fashion_iq
from fromage.evals.genecis import dilated, read_genecis
from fromage.evals.options import Options
from fromage.evals.report import markdown, table
from fromage.images.regions import Region
from fromage.models.encode_files import encode_files

SYSTEMS = ("fromage", "clip", "clip image", "clip text", "chance")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Reports keep four digits; here all of them."""
    monkeypatch.setattr(base, "_rounded", dict)


@pytest.fixture
def of_circo(world):
    folder = world / "composed" / "circo"
    notes = folder / "annotations"
    return notes / "val.json", notes / "image_info_unlabeled2017.json", folder / "unlabeled2017"


@pytest.fixture
def of_cirr(world):
    folder = world / "composed" / "cirr"
    return folder / "captions" / "cap.rc2.val.json", folder / "image_splits" / "split.rc2.val.json", folder


def load(path):
    return json.loads(path.read_text())


def ranked(query, rows, left):
    """Numbers of the items that are left, the best first."""
    return sorted(left, key=lambda item: -float(query.double() @ rows[item].double()))


@torch.no_grad()
def embedded(model, places, asked):
    """Rows of the gallery and queries of every system, straight from the towers. asked: (number of an image, words)."""
    features = encode_files(model, places, Options()).features
    clip = model.vision.text_tower()
    own, theirs = model.embed_images(features), clip.embed_features(features)
    numbers, words = [i for i, _ in asked], [text for _, text in asked]
    texts = clip.embed_text(words)
    spoken = {
        "": model.embed_text([[features[i], text] for i, text in asked]),
        "_asked": model.embed_text(
            [[features[i], f"Q:{text.strip().rstrip('.')}.\nA:it becomes a photo of"] for i, text in asked]
        ),
    }
    return {
        "fromage": (spoken[""], own),
        "asked": (spoken["_asked"], own),
        "clip": (F.normalize((theirs[numbers] + texts) / 2, dim=-1), theirs),
        "clip image": (theirs[numbers], theirs),
        "clip text": (texts, theirs),
    }


def circo_precision(order, right, k):
    """CIRCO's evaluation.py in words: precision at each place of a right image, summed to place k, over min(right, k)."""
    labels = [item in right for item in order]
    precisions = [sum(labels[: i + 1]) / (i + 1) if label else 0.0 for i, label in enumerate(labels)]
    return sum(precisions[:k]) / min(len(right), k)


def test_circo_is_evaluated_as_its_authors_do(toy_model, of_circo):
    annotations, info, images = of_circo
    report = circo.evaluate(toy_model, read_circo(annotations, info, images))
    ids = [image["id"] for image in load(info)["images"]]
    queries = load(annotations)
    asked = [(ids.index(q["reference_img_id"]), q["relative_caption"]) for q in queries]
    found = embedded(toy_model, [images / f"{i:012d}.jpg" for i in ids], asked)
    assert report["gallery"] == len(ids) and report["queries"] == len(queries)
    for who, (rows, gallery) in found.items():
        settings = {"composed_asked": True} if who == "asked" else {"composed": True, "composed_reference_kept": False}
        for at, without in settings.items():
            orders = [
                ranked(row, gallery, [i for i in range(len(ids)) if not without or i != reference])
                for row, (reference, _) in zip(rows, asked, strict=True)
            ]
            for k in (5, 10, 25, 50):
                want = statistics.mean(
                    circo_precision([ids[i] for i in order], q["gt_img_ids"], k)
                    for order, q in zip(orders, queries, strict=True)
                )
                got = report["fromage" if who == "asked" else who][at][f"map{k}"]
                assert got == pytest.approx(100 * want, abs=1e-6), (who, at, k)
    assert "composed_asked" not in report["clip"] and [who for who in SYSTEMS if who in report] == list(SYSTEMS)


def test_cirr_is_evaluated_as_its_server_does(toy_model, of_cirr):
    annotations, split, images = of_cirr
    report = cirr.evaluate(toy_model, read_cirr(annotations, split, images))
    names, pairs = list(load(split)), load(annotations)
    asked = [(names.index(pair["reference"]), pair["caption"]) for pair in pairs]
    found = embedded(toy_model, [images / place for place in load(split).values()], asked)
    for who, (rows, gallery) in found.items():
        for at, ks in (("all", (1, 5, 10, 50)), ("subset", (1, 2, 3))):
            places = []
            for row, pair in zip(rows, pairs, strict=True):
                left = names if at == "all" else pair["img_set"]["members"]
                order = ranked(row, gallery, [names.index(name) for name in left if name != pair["reference"]])
                places.append(order.index(names.index(pair["target_hard"])) + 1)
            system, setting = ("fromage", f"{at}_asked") if who == "asked" else (who, at)
            for k in ks:
                want = 100 * sum(place <= k for place in places) / len(places)
                assert report[system][setting][f"r{k}"] == pytest.approx(want, abs=1e-6), (who, at, k)
    count = len(names) - 1
    assert report["chance"]["all"]["r10"] == pytest.approx(100 * 10 / count, abs=1e-6)
    assert report["chance"]["subset"] == pytest.approx({"r1": 20, "r2": 40, "r3": 60})


def test_servers_get_what_they_take_of_a_test_split_and_of_any_other(toy_model, of_circo, of_cirr, tmp_path):
    annotations, info, images = of_circo
    hidden = read_circo(annotations.with_name("test.json"), info, images)
    with pytest.raises(UserError, match=r"test\.json: a test split.*--server-files"):
        circo.evaluate(toy_model, hidden)
    report = circo.evaluate(toy_model, hidden, server_files=tmp_path)
    assert "fromage" not in report and "circo_composed.json" in table(report)
    queries, known = load(annotations.with_name("test.json")), {image["id"] for image in load(info)["images"]}
    written = load(tmp_path / "circo_composed.json")
    assert list(written) == [str(query["id"]) for query in queries]
    for query in queries:
        found = written[str(query["id"])]
        assert len(found) == len({*found}) == min(50, len(known) - 1) and {*found} <= known - {query["reference_img_id"]}

    annotations, split, images = of_cirr
    data = read_cirr(annotations, split, images)
    report = cirr.evaluate(toy_model, data, Options(clip=False), tmp_path)
    pairs = load(annotations)
    for at in ("all", "all_asked"):
        whole, subset = (load(tmp_path / f"cirr_{at.replace('all', gallery)}.json") for gallery in ("all", "subset"))
        assert (whole.pop("version"), whole.pop("metric")) == ("rc2", "recall")
        assert (subset.pop("version"), subset.pop("metric")) == ("rc2", "recall_subset")
        assert list(whole) == list(subset) == [str(pair["pairid"]) for pair in pairs]
        first = [whole[str(pair["pairid"])][0] == pair["target_hard"] for pair in pairs]
        assert report["fromage"][at]["r1"] == pytest.approx(100 * sum(first) / len(first), abs=1e-6)
        for pair in pairs:
            some = subset[str(pair["pairid"])]
            assert len(some) == 3 and {*some} <= {*pair["img_set"]["members"]} - {pair["reference"]}
            assert pair["reference"] not in whole[str(pair["pairid"])]
    with pytest.raises(UserError, match="is there already"):
        cirr.evaluate(toy_model, data, Options(clip=False), tmp_path)
    assert (tmp_path / "cirr_all.json").stat().st_size < 1.2 * len(json.dumps(load(tmp_path / "cirr_all.json")))


def test_a_pair_of_cirr_without_words_is_its_image_alone(toy_model, of_cirr, tmp_path):
    annotations, split, images = of_cirr
    pairs = load(annotations)
    pairs[0]["caption"] = " "
    (path := tmp_path / "cap.rc2.test1.json").write_text(json.dumps([{**pair, "target_hard": None} for pair in pairs]))
    data = read_cirr(path, split, images)
    assert data.is_test and len(data.queries) == data.stored == len(pairs)
    cirr.evaluate(toy_model, data, Options(clip=False), tmp_path / "out")
    names, places = list(load(split)), [images / place for place in load(split).values()]
    features = encode_files(toy_model, places, Options()).features
    own = names.index(pairs[0]["reference"])
    query = toy_model.embed_text([[features[own]]])[0]
    best = ranked(query, toy_model.embed_images(features), [i for i in range(len(names)) if i != own])
    assert load(tmp_path / "out" / "cirr_all.json")[str(pairs[0]["pairid"])][:3] == [names[i] for i in best[:3]]


def test_a_servers_file_has_all_queries_or_is_not_written(toy_model, of_circo, tmp_path):
    annotations, info, images = of_circo
    with pytest.raises(UserError, match=r"val\.json: the server's file wants all \d+ queries, of which 2 can be .*--limit"):
        circo.evaluate(toy_model, read_circo(annotations, info, images, limit=2), server_files=tmp_path / "out")
    for path in images.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / f"{load(annotations)[0]['reference_img_id']:012d}.jpg").unlink()
    data = read_circo(annotations, info, tmp_path)
    with pytest.raises(UserError, match=rf"wants all {len(data.queries)} queries, of which {len(data.queries) - 1} can"):
        circo.evaluate(toy_model, data, Options(clip=False, max_lost=0.9), server_files=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_a_test_split_the_published_rows_alone_are_shown(toy_model, of_circo, tmp_path, monkeypatch):
    annotations, info, images = of_circo
    test = annotations.with_name("test.json")
    monkeypatch.setattr(circo, "OFFICIAL", {len(load(test))})
    report = circo.evaluate(toy_model, read_circo(test, info, images), Options(clip=False), tmp_path / "out")
    assert report["paper"]["MCL OPT-6.7B"]["composed_asked"]["map5"] == 15.14 and "fromage" not in report
    for shown in (table(report), markdown(report)):
        assert "MCL Llama-2-7B" in shown and "(4.0" in shown and "(6.37" in shown
    assert report["checkpoint"] not in markdown(report), "the paper's rows are not of our checkpoint"
    monkeypatch.undo()
    report = circo.evaluate(toy_model, read_circo(test, info, images), Options(clip=False), tmp_path / "other")
    assert not report["headline"] and not report["paper"]


@pytest.fixture
def of_fashion_iq(world, tmp_path):
    """Two kinds of six and four images."""
    paths = sorted((world / "coco" / "val2017").iterdir())
    for kind, some in (("dress", paths[:6]), ("toptee", paths[6:10])):
        names = [f"B00{kind[0].upper()}{i}" for i in range(len(some))]
        for name, path in zip(names, some, strict=True):
            (tmp_path / "images").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "images" / f"{name}.jpg")
        queries = [{"target": a, "candidate": b, "captions": ["is red.", " has a small star ?"]}
                   for a, b in itertools.pairwise(names)]  # fmt: skip
        for place, content in (("captions/cap", queries), ("image_splits/split", names)):
            path = tmp_path / f"{place}.{kind}.val.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
    return tmp_path


def test_fashion_iq_is_evaluated_by_kind_with_both_captions(toy_model, of_fashion_iq, monkeypatch):
    monkeypatch.setattr(fashion_iq, "RECALL", (1, 3))
    report = fashion_iq.evaluate(toy_model, read_fashion_iq(of_fashion_iq, of_fashion_iq / "images"))
    shares = {}
    for kind in ("dress", "toptee"):
        names, queries = (load(of_fashion_iq / f"{at}.{kind}.val.json") for at in ("image_splits/split", "captions/cap"))
        asked = [(names.index(query["candidate"]), "is red and has a small star") for query in queries]
        found = embedded(toy_model, [of_fashion_iq / "images" / f"{name}.jpg" for name in names], asked)
        for who in ("fromage", "clip"):
            rows, gallery = found[who]
            orders = [ranked(row, gallery, range(len(names))) for row in rows]  # the candidate stays
            hits = [[names[i] for i in o[:3]].count(q["target"]) for o, q in zip(orders, queries, strict=True)]
            shares[who, kind] = 100 * statistics.mean(hits)
            assert report[who][kind]["r3"] == pytest.approx(shares[who, kind], abs=1e-6)
    for who in ("fromage", "clip"):
        mean = (shares[who, "dress"] + shares[who, "toptee"]) / 2
        assert report[who]["mean"]["r3"] == pytest.approx(mean, abs=1e-6)
    assert report["fromage"]["dress"].keys() == {"r1", "r3"} and report["gallery"] == 10
    (of_fashion_iq / "image_splits" / "split.dress.val.json").write_text('["B00D0"]')
    with pytest.raises(UserError, match="lacks image"):
        read_fashion_iq(of_fashion_iq, of_fashion_iq / "images")
    with pytest.raises(UserError, match=r"cap\.dress\.val\.json"):
        read_fashion_iq(of_fashion_iq / "images", of_fashion_iq)


def test_the_published_recalls_of_fashion_iq_are_at_10_and_50():
    assert fashion_iq.RECALL == (10, 50)


@pytest.fixture
def of_genecis(world, tmp_path):
    """A task about images and one about regions, of three images in a gallery."""
    coco = world / "coco" / "val2017"
    ids = [int(path.stem) for path in sorted(coco.iterdir())][:8]
    (tmp_path / "val2017").symlink_to(coco)
    (tmp_path / "VG_100K_2").mkdir()
    for i in ids:
        Image.open(coco / f"{i:012d}.jpg").resize((96, 60)).save(tmp_path / "VG_100K_2" / f"{i}.jpg")
    shown = [{"val_image_id": i} for i in ids]
    boxes = [{"image_id": i, "instance_bbox": [8 * n, 5, 20, 30 + n], "object_name": "x"} for n, i in enumerate(ids)]
    for name, some in (("focus_object", shown), ("change_attribute", boxes)):
        content = [{"condition": word, "reference": some[n], "target": some[n + 1], "gallery": some[n + 2 : n + 4]}
                   for n, word in enumerate(("star", "snow", "at night", "a red moon"))]  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def cut(path, box):
    """GeneCIS' load_cropped_image and expand2square in words."""
    image = Image.open(path)
    left, top = max(0, box[0] - 0.7 * box[2]), max(0, box[1] - 0.7 * box[3])
    right, bottom = min(image.width, left + 1.7 * box[2]), min(image.height, top + 1.7 * box[3])
    part = image.crop((left, top, right, bottom))
    side = max(part.size)
    square = Image.new("RGB", (side, side), (0, 0, 0))
    square.paste(part, (0, (side - part.height) // 2) if part.width > part.height else ((side - part.width) // 2, 0))
    return square


@torch.no_grad()
def test_genecis_is_evaluated_on_its_small_galleries_and_regions(toy_model, of_genecis):
    sets = read_genecis([of_genecis / "focus_object.json", of_genecis / "change_attribute.json"], of_genecis)
    report = genecis.evaluate(toy_model, sets)
    means = []
    for name in ("focus_object", "change_attribute"):
        places = []
        for entry in load(of_genecis / f"{name}.json"):
            some = [entry["reference"], entry["target"], *entry["gallery"]]
            if name == "focus_object":
                opened = [Image.open(of_genecis / "val2017" / f"{i['val_image_id']:012d}.jpg") for i in some]
            else:
                opened = [cut(of_genecis / "VG_100K_2" / f"{i['image_id']}.jpg", i["instance_bbox"]) for i in some]
            pixels = torch.stack([toy_model.vision.transform(image.convert("RGB")) for image in opened])
            features = toy_model.vision(pixels).float()
            query = toy_model.embed_text([[features[0], entry["condition"]]])[0]
            places.append(1 + ranked(query, toy_model.embed_images(features), [1, 2, 3]).index(1))
        for k in (1, 2, 3):
            want = 100 * sum(place <= k for place in places) / 4
            assert report["fromage"][name][f"r{k}"] == pytest.approx(want, abs=1e-6), (name, places)
        means.append(report["fromage"][name]["r1"])
        assert report["chance"][name]["r1"] == pytest.approx(100 / 3, abs=1e-6)
    assert report["fromage"]["mean"]["r1"] == pytest.approx(sum(means) / 2) and report["paper"] == {}
    with pytest.raises(UserError, match="is no task of GeneCIS"):
        read_genecis([of_genecis / "other.json"], of_genecis)
    with pytest.raises(UserError, match="two files of this name"):
        read_genecis([of_genecis / "focus_object.json"] * 2, of_genecis)


def test_a_region_is_what_genecis_cuts_and_one_outside_is_lost(toy_model, of_genecis, tmp_path):
    path = next((of_genecis / "VG_100K_2").iterdir())
    for box in ([0, 0, 10, 4], [70, 30, 40, 40], [20.4, 10.6, 9.5, 30]):
        region = Region(path, dilated(*box)).cut(Image.open(path))
        assert region.size == cut(path, box).size and region.tobytes() == cut(path, box).tobytes()
    good, gone = Region(path, (0, 0, 9, 9)), Region(path, (500, 0, 600, 50))
    found = encode_files(toy_model, [good, gone], Options(max_lost=0.5))
    assert found.row == {good: 0} and found.lost == [("broken", gone)]


def test_published_rows_stand_beside_the_published_files_alone(toy_model, of_circo, monkeypatch):
    report = circo.evaluate(toy_model, read_circo(*of_circo), Options(clip=False))
    assert report["paper"] == {} and "none on these data" in report["protocol"]["published rows"]
    monkeypatch.setattr(circo, "OFFICIAL", {len(load(of_circo[0]))})
    assert not read_circo(*of_circo, limit=1).published
    report = circo.evaluate(toy_model, read_circo(*of_circo))
    paper = report["paper"]
    assert paper["fromage"]["composed_asked"]["map5"] == 4.0 and paper["clip"]["composed"]["map50"] == 8.72
    assert paper["MCL OPT-6.7B"]["composed_asked"]["map5"] == 15.14
    shown = table(report)
    assert "MCL Llama-2-7B" in shown and "(15.14)" in shown and "(6.37)" in shown


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"relative_caption": "  "}, "not a text that is not empty"),
        ({"reference_img_id": 99999}, "lacks image 99999"),
        ({"gt_img_ids": [99999]}, "lacks image 99999"),
        ({"gt_img_ids": "x"}, "not a list of whole numbers"),
    ],
)
def test_odd_queries_are_refused_in_one_line(of_circo, tmp_path, change, said):
    annotations, info, images = of_circo
    path = tmp_path / "val.json"
    path.write_text(json.dumps([query | change for query in load(annotations)]))
    with pytest.raises(UserError, match=said):
        read_circo(path, info, images)


def test_files_of_other_kinds_are_named(of_circo, of_cirr):
    with pytest.raises(UserError, match="is composed queries of CIRR, and not composed queries of CIRCO"):
        read_circo(of_cirr[0], *of_circo[1:])
    with pytest.raises(UserError, match="is composed queries of CIRCO, and not composed queries of CIRR"):
        read_cirr(of_circo[0], *of_cirr[1:])
    with pytest.raises(UserError, match="is images of COCO, and not an image split of CIRR"):
        read_cirr(of_cirr[0], of_circo[1], of_cirr[2])
    half = ComposedSet("val.json", [Composed("0", of_circo[2], "x", (of_circo[2],)), Composed("1", of_circo[2], "x")], [])
    with pytest.raises(UserError, match="1 queries have no right image"):
        half.check(None)
