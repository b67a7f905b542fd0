"""What the benchmarks share: CLIP is looked for first, what is lost is left out, and the report keeps what belongs to it."""

import warnings
from dataclasses import replace

import pytest
import torch

from fromage.errors import UserError
from fromage.evals import chatir, circo, cirr, coco, visdial, vist
from fromage.evals.base import EvaluationRun
from fromage.evals.caption_sets import read_caption_set
from fromage.evals.chatir import read_chats
from fromage.evals.circo import read_circo
from fromage.evals.cirr import read_cirr
from fromage.evals.dialogues import read_dialogues
from fromage.evals.options import Options
from fromage.evals.report import markdown, table
from fromage.evals.retrieval import evaluate_clip
from fromage.evals.vist import read_stories


@pytest.fixture
def benchmarks(world):
    talks, composed = world / "visdial", world / "composed"
    listed = composed / "circo" / "annotations"
    of_cirr = composed / "cirr"
    of_chatir = (composed / "chatir" / name for name in ("VisDial_v1.0_queries_val.json", "Search_Space_val_50k.json"))
    files = "visdial_1.0_val.json", "visdial_1.0_val_dense_annotations.json", "images/val"
    chats = read_chats(*of_chatir, composed / "circo", 2)
    return {
        coco: read_caption_set(
            world / "coco" / "annotations" / "captions_val2017.json", world / "coco" / "val2017", limit=3
        ),
        vist: read_stories(world / "vist" / "sis" / "val.story-in-sequence.json", world / "vist" / "images" / "val", 1),
        visdial: read_dialogues(*(talks / name for name in files), limit=2),
        circo: read_circo(
            listed / "val.json", listed / "image_info_unlabeled2017.json", composed / "circo" / "unlabeled2017", 2
        ),
        cirr: read_cirr(
            of_cirr / "captions" / "cap.rc2.val.json", of_cirr / "image_splits" / "split.rc2.val.json", of_cirr, 2
        ),
        chatir: replace(chats, dialogues=[(image, texts[:2]) for image, texts in chats.dialogues]),
    }


def test_a_tower_without_text_tower_has_no_baseline_which_is_told_before_the_first_image(toy_model, benchmarks, monkeypatch):
    encoded, forward = [], toy_model.vision.forward
    monkeypatch.setattr(toy_model.vision, "forward", lambda pixels: encoded.append(len(pixels)) or forward(pixels))
    monkeypatch.setattr(toy_model.vision, "text_tower", lambda: None)
    monkeypatch.setattr(visdial, "score_answers", lambda *rest: {})
    told = []
    monkeypatch.setattr(warnings, "warn", lambda said, **how: told.append((said, len(encoded))))
    for module, data in benchmarks.items():
        report, without = module.evaluate(toy_model, data), module.evaluate(toy_model, data, Options(clip=False))
        assert told == [("toy has no text tower: no CLIP baseline", 0)] and encoded
        assert report["protocol"]["clip"] == told[0][0] != without["protocol"]["clip"]
        assert f"clip: {told[0][0]}" in table(report).splitlines()
        for found in (report, without):
            assert not [who for who in (*found, *found["paper"]) if "clip" in who] and found["fromage"]
        encoded.clear(), told.clear()
    with pytest.raises(UserError, match="toy has no text tower: no CLIP baseline"):
        evaluate_clip(toy_model, [])


def test_what_has_a_lost_image_is_left_out(toy_model, benchmarks, tmp_path):
    images = [*benchmarks[coco].images, tmp_path / "gone.png"]
    run = EvaluationRun(toy_model, "data.json", images, Options(max_lost=0.5))
    assert run.keep([images[:2], images[2:]], lambda pair: pair) == [images[:2]]
    with pytest.raises(UserError, match=r"data\.json: no entry has all its images"):
        run.keep([images[3:]], lambda paths: paths)


@torch.no_grad()
def test_a_report_is_printed_with_published_figures_of_its_settings_alone(toy_model, benchmarks):
    run = EvaluationRun(toy_model, "data.json", benchmarks[coco].images, None)
    figures = {"fromage": {"a": {"r1": 12.34567, "r5": 50.0}, "b": {"right": 7.0}}, "chance": {"a": {"r1": 1.0, "r5": 5.0}}}
    paper = {"fromage": {"a": {"r5": 60.0}, "c": {"r1": 1.0}}, "clip": {"a": {"r1": 2.0}}}
    report = run.report("some", figures, {"gallery": 3}, {"entries": 2}, {"a": "first"}, paper, ("a", "c"))
    assert report["fromage"]["a"] == {"r1": 12.3457, "r5": 50.0} and report["paper"] == {"fromage": {"a": {"r5": 60.0}}}
    assert report["skipped"] == {"images missing": 0, "images broken": 0, "entries": 2} and report["lost"] == []
    assert table(report).split("\n\n") == [
        "some: data.json\ngallery 3; skipped: 2 entries",
        "              r1           r5\na  fromage  12.3  50.0 (60.0)\na  chance    1.0          5.0",
        "            right\nb  fromage    7.0",
        "a: first",
    ]
    assert markdown(report).splitlines() == [
        "| some, R@1 / 5 in % | a |",
        "| --- | --- |",
        f"| fromage {toy_model.fingerprint()} | 12.3 / 50.0 (- / 60.0) |",
        "| chance | 1.0 / 5.0 |",
    ]
