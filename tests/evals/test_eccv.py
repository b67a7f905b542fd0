"""ECCV Caption and CxC: figures as their own program counts full rankings, and what is refused."""

import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fromage.cli.eval_options import CaptionOptions
from fromage.errors import UserError
from fromage.evals import eccv
from fromage.evals.caption_sets import Numbers
from fromage.evals.coco import evaluate
from fromage.evals.eccv import chance_figures, figures, read_test, scorer
from fromage.evals.options import Options

SHORT = {"t2i": "text_to_image", "i2t": "image_to_text"}


@pytest.fixture(scope="module")
def numbers():
    listed = scorer().coco_gts["i2t"]
    return Numbers([*listed], [i for own in listed.values() for i in own])


def test_figures_are_those_of_the_official_program(numbers):
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(5000, 16, generator=generator), dim=1)
    texts = F.normalize(images.repeat_interleave(5, 0) + 0.2 * torch.randn(25000, 16, generator=generator), dim=1)
    found = figures(texts, images, numbers)
    scores = texts.double() @ images.double().T  # (N, M)
    orders = {"t2i": scores.topk(100).indices, "i2t": scores.T.topk(100).indices}
    names = {"t2i": (numbers.texts, numbers.images), "i2t": (numbers.images, numbers.texts)}
    ranked = {
        way: {own: [names[way][1][i] for i in row] for own, row in zip(names[way][0], order.tolist(), strict=True)}
        for way, order in orders.items()
    }
    wanted = ("eccv_r1", "eccv_map_at_r", "eccv_rprecision", "cxc_recalls")
    official = scorer().compute_all_metrics(ranked["i2t"], ranked["t2i"], target_metrics=wanted)
    for metric, ways in official.items():
        kind, name = metric.split("_", 1)
        for way, value in ways.items():
            assert found[f"{kind}_{SHORT[way]}"][name] == pytest.approx(100 * value, abs=1e-6), metric
    assert len(official) == 6 and 1 < found["eccv_text_to_image"]["map_at_r"] < 95


def test_chance_is_what_random_rankings_have(numbers):
    generator = torch.Generator().manual_seed(1)
    some = [figures(torch.randn(25000, 8, generator=generator), torch.randn(5000, 8, generator=generator), numbers)]
    for setting, expected in chance_figures(numbers).items():
        for name, value in expected.items():
            assert value < 0.5 and some[0][setting][name] == pytest.approx(value, abs=0.4), (setting, name)


@pytest.fixture
def small(monkeypatch, world, tmp_path):
    """Lists of ten images of the toy world, and a file of theirs."""
    content = json.loads((world / "coco" / "annotations" / "captions_val2017.json").read_text())
    images = sorted(each["id"] for each in content["images"])[:10]
    own = {i: [each["id"] for each in content["annotations"] if each["image_id"] == i][:5] for i in images}
    back = {text: [image] for image, texts in own.items() for text in texts}
    first, some = images[0], images[1:5]
    more = {"i2t": {i: own[i] + own[first] for i in some}, "t2i": {own[i][0]: [i, first] for i in some}}
    metrics = scorer()
    metrics.coco_ids = np.array([text for image in images[::-1] for text in own[image]])
    metrics.coco_gts, metrics.eccv_gts, metrics.cxc_gts = {"i2t": own, "t2i": back}, more, {"i2t": own, "t2i": back}
    monkeypatch.setattr(eccv, "scorer", lambda: metrics)
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(content))
    return path


def test_figures_stand_beside_those_of_coco(small, world, toy_model, tmp_path):
    data = read_test(small, world / "coco" / "val2017")
    assert len(data.images) == 10 and list(map(len, data.captions)) == [5] * 10
    assert data.numbers.images == [*eccv.scorer().coco_gts["i2t"]][::-1], "in the order of the list of captions"
    report = evaluate(toy_model, data, Options(clip=False))
    for who in ("fromage", "chance"):
        for way in SHORT.values():
            assert {"r1", "rprecision", "map_at_r"} == report[who][f"eccv_{way}"].keys()
            assert report[who][f"cxc_{way}"].keys() == {"r1", "r5", "r10"}
    plain = report["fromage"]["text_to_image"]
    assert report["fromage"]["cxc_text_to_image"] == pytest.approx({name: plain[name] for name in ("r1", "r5", "r10")})
    assert "eccv_..." in report["protocol"]
    data.images[3] = tmp_path / "missing.jpg"
    report = evaluate(toy_model, data, Options(clip=False, max_lost=0.5))
    assert "eccv_text_to_image" not in report["fromage"] and "lost" in report["protocol"]["eccv"]


def test_a_file_without_the_test_split_is_refused(small, world, tmp_path, capsys):
    content = json.loads(small.read_text())
    content["annotations"] = content["annotations"][7:]
    small.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"lacks \d+ images and captions of COCO's test split; name captions_val2014.json"):
        read_test(small, world / "coco" / "val2017")
    with pytest.raises(UserError, match="leave out --limit"):
        CaptionOptions(ckpt="toy", images=tmp_path, limit=5).captions(small, "coco", eccv=True)


def test_without_the_package_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "eccv_caption", None)
    with warnings.catch_warnings(), pytest.raises(UserError, match=r"eccv_caption.*\[evals\]"):
        scorer()
