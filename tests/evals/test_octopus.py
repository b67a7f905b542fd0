"""Evaluations of Octopus: figures of answers that are known, and the verbs from files to a table and JSON."""

import json
import pickle

import pytest
import torch
from PIL import Image
from tiny_octopus import save_untrained

from fromage.cli.main import main
from fromage.errors import UserError
from fromage.evals import pope as evaluating_pope
from fromage.evals import predict as predicting
from fromage.evals import refcoco as evaluating_refcoco
from fromage.evals.instructions import evaluate as evaluate_instructions
from fromage.evals.options import Options
from fromage.evals.pope import coin, figures
from fromage.evals.pope import evaluate as evaluate_pope
from fromage.evals.predict import ImageStream, listed, predict
from fromage.evals.refcoco import evaluate as evaluate_refcoco
from fromage.evals.report import table
from fromage.models.fromage import Fromage
from fromage.octopus.answers import GroundedAnswer, answer_ids
from fromage.octopus.boxes import spelled
from fromage.octopus.decoding import ground
from fromage.octopus.metrics import chance_metrics
from fromage.octopus.model import Octopus, load_octopus
from fromage.octopus.sources import Instructions, Pope, RefCOCO
from fromage.octopus.sources.file_source import with_masks

A, B, FAR = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0), (0.9, 0.0, 1.0, 0.1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    out = tmp_path_factory.mktemp("octopus")
    kinds = {"octopus": (4,), "sequential": (0,), "masks": (4, 4)}
    return {name: str(save_untrained(out / f"{name}.ckpt", *kind)) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def octopus(checkpoints):
    return load_octopus(checkpoints["octopus"])


def refcoco(world, split="val", **options):
    files = (world / "refcoco" / name for name in ("refs(unc).p", "instances.json", "images"))
    return RefCOCO(*map(str, files), split=split, **options)


@pytest.fixture
def answering(monkeypatch):
    """Let answers be made of the examples themselves."""

    def patch(data, answer):
        every = [example for source in listed(data) for example in source]
        order = ImageStream(None, [example.image for example in every], Options()).batches
        right = iter([every[i] for batch in order for i in batch])
        told = lambda model, prompts, *options: [answer(next(right)) for _ in prompts]  # noqa: E731
        monkeypatch.setattr(predicting, "ground", told)

    return patch


def pieces(example, box=lambda box: box):
    return [piece if isinstance(piece, str) else box(example.boxes[piece]) for piece in example.answer]


def test_right_answers_are_worth_a_hundred_and_the_head_is_measured_apart(octopus, world, answering):
    data = refcoco(world, limit=12)
    answering(data, lambda e: GroundedAnswer("", pieces(e), [(FAR, 0.9), (e.boxes[e.meant[0]], 0.5)], [1]))
    report = evaluate_refcoco(octopus, data, Options(5))
    own, chance = report["octopus"]["val"], report["chance"]["val"]
    assert own["acc_iou50"] == own["head_recall_top5"] == own["all_found"] == 100 and own["head_recall_top1"] == 0
    assert own["mean_iou"] == pytest.approx(100) and 0 <= own["head_iou"] < 50
    assert 0 < chance["acc_iou50"] < 100 and "head_recall_top1" not in chance and report["examples"] == 12
    text = table(report)
    assert "head_recall_top5" in text and "sequential" not in text and report["checkpoint"] == octopus.fingerprint()


def test_wrong_answers_are_worth_nothing(octopus, world, answering):
    data = refcoco(world, limit=6)
    answering(data, lambda e: GroundedAnswer("", [], [(e.boxes[e.meant[0]], 0.9)]))
    own = evaluate_refcoco(octopus, data)["octopus"]["val"]
    assert own["acc_iou50"] == own["mean_iou"] == own["all_found"] == 0 and own["head_recall_top1"] == 100


def test_a_report_names_the_pattern_it_is_of(octopus, world, answering):
    data = refcoco(world, limit=6, match="left of|above")
    answering(data, lambda e: GroundedAnswer("", pieces(e), [(FAR, 0.9)], [0]))
    report = evaluate_refcoco(octopus, data)
    assert "'left of|above'" in report["protocol"]["expressions"] and report["octopus"]["val"]["acc_iou50"] == 100
    assert report["skipped"]["expressions that do not match"] > 0


def right(example):
    return GroundedAnswer("", pieces(example), [(example.boxes[example.meant[0]], 0.9)], [0])


def test_splits_of_one_run_have_figures_of_their_own(octopus, world, answering):
    splits = [refcoco(world, split, limit=count) for split, count in (("val", 4), ("train", 6))]
    answering(splits, lambda e: right(e) if e.image.endswith(("0.jpg", "1.jpg")) else GroundedAnswer("", []))
    report = evaluate_refcoco(octopus, splits, Options(4))
    assert [*report["octopus"]] == [*report["chance"]] == ["val", "train"]
    assert (report["examples"], report["examples_val"], report["examples_train"]) == (10, 4, 6)
    assert report["octopus"]["val"]["seconds"] > 0 and "from image file to answer" in report["protocol"]["seconds"]


@pytest.fixture(scope="module")
def segmenting(checkpoints):
    return load_octopus(checkpoints["masks"])


def test_masks_are_measured_at_the_size_of_the_image_and_not_kept(segmenting, world, answering, monkeypatch):
    data = refcoco(world, limit=12)
    with_masks([known := refcoco(world, limit=12)])
    every = [example.masks[0].pixels() for example in known]
    left = [torch.arange(w).repeat(h, 1) < w // 2 for h, w in (mask.shape for mask in every)]
    half = torch.tensor([[1.0, -1.0]])  # what is left of the middle
    answering(known, lambda e: GroundedAnswer("", pieces(e), queries=[0], masks=[half]))
    kept = []
    monkeypatch.setattr(evaluating_refcoco, "predict", lambda *given: kept.append(predict(*given)) or kept[-1])
    figures = evaluate_refcoco(segmenting, data)["octopus"]["val"]
    areas = [(int((m & s).sum()), int((m | s).sum())) for m, s in zip(every, (mask.numpy() for mask in left), strict=True)]
    assert figures["mask_ciou"] == pytest.approx(100 * sum(b for b, _ in areas) / sum(e for _, e in areas), abs=1e-3)
    assert figures["mask_mean_iou"] == pytest.approx(100 * sum(b / e for b, e in areas) / 12, abs=1e-3)
    assert 30 < figures["box_ciou"] < 100 and all(not answer.masks for _, answer in kept[0].pairs[0])
    answering(known, lambda e: GroundedAnswer("", []))
    nothing = evaluate_refcoco(segmenting, data)["octopus"]["val"]
    assert nothing["mask_ciou"] == nothing["mask_mean_iou"] == nothing["box_ciou"] == 0


def test_masks_of_a_model_without_are_not_spoken_of(octopus, segmenting, world):
    plain, own = (evaluate_refcoco(model, refcoco(world, limit=4)) for model in (octopus, segmenting))
    assert "ciou" not in table(plain) and 0 <= own["octopus"]["val"]["mask_ciou"] <= 100
    assert "mask_ciou" in table(own) and "at the image's own size" in own["protocol"]["mask_ciou, mask_mean_iou"]


def test_published_figures_of_masks_stand_beside_masks_of_refcoco_alone(octopus, segmenting, world, answering, monkeypatch):
    data = refcoco(world)
    monkeypatch.setitem(evaluating_refcoco.OFFICIAL, ("val", len(data)), "RefCOCO")
    for model, published in ((octopus, None), (segmenting, {"val": {"mask_ciou": 63.6}})):
        answering(data, right)
        report = evaluate_refcoco(model, data)
        assert report["paper"].get("Octopus, masks") == published and ("(63.6)" in table(report)) == bool(published)
    splits = {"testA": "RefCOCO", "testB": "RefCOCO"}
    named = evaluating_refcoco.published(splits, {*splits})["Octopus, masks"]
    assert named == {"testA": {"mask_ciou": 66.6}, "testB": {"mask_ciou": 61.3}}
    assert "Octopus, masks" not in evaluating_refcoco.published({"val": "RefCOCO+"}, {"val"})


def test_a_damaged_mask_costs_the_published_figures_of_masks_alone(segmenting, world, answering, monkeypatch, tmp_path):
    content = json.loads((world / "refcoco" / "instances.json").read_text())
    for note in content["annotations"]:
        note["segmentation"] = {"size": [1, 1], "counts": [7]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    whole = refcoco(world)
    data = RefCOCO(str(whole.file), str(tmp_path / "instances.json"), str(world / "refcoco" / "images"), split="val")
    monkeypatch.setitem(evaluating_refcoco.OFFICIAL, ("val", len(whole)), "RefCOCO")
    answering(whole, right)
    with pytest.warns(UserWarning, match="masks that are damaged"):
        report = evaluate_refcoco(segmenting, data)
    assert report["examples"] == len(whole) and report["octopus"]["val"]["acc_iou50"] == 100
    assert "Octopus, 224 px" in report["paper"] and "Octopus, masks" not in report["paper"]


def test_masks_are_read_as_the_boxes_are_with_as_many_odd_entries(checkpoints, verbs, world, tmp_path, capsys):
    refs = pickle.loads((world / "refcoco" / "refs(unc).p").read_bytes())
    for ref in refs[::3]:
        ref["sentences"] = "none"
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    words = [tmp_path / "refs(unc).p", *verbs["refcoco"][1:], "--ckpt", checkpoints["masks"], "--limit", "2"]
    assert main(["eval", "refcoco", *map(str, words), "--max-lost", "0.6", "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["skipped"]["odd entries"] == len(refs[::3])
    assert "mask_ciou" in capsys.readouterr().out


def test_a_spelled_box_has_room_whatever_the_right_ones_of_a_few_examples(checkpoints, world, monkeypatch):
    sequential, (example,) = load_octopus(checkpoints["sequential"]), list(refcoco(world, limit=1))
    encode, text = sequential.tokenizer.encode, spelled(example.boxes[example.answer[0]])
    monkeypatch.setattr(type(sequential.tokenizer), "encode", lambda self, text: encode(text)[:3])
    ids = len(answer_ids(example, sequential.tokenizer, 0))
    assert predicting.room(example, sequential) == ids - 3 + len(text) > ids, "a short box, and another could be longer"


def test_published_figures_stand_beside_official_splits_alone(octopus, world, answering, monkeypatch):
    data = refcoco(world)
    answering(data, right)
    toy = evaluate_refcoco(octopus, data)
    assert not toy["paper"] and "in brackets" not in toy["protocol"] and "Shikra" not in table(toy)
    monkeypatch.setitem(evaluating_refcoco.OFFICIAL, ("val", len(data)), "RefCOCOg")
    answering(data, right)
    report = evaluate_refcoco(octopus, data)
    assert report["paper"]["Octopus, 224 px"]["val"] == {
        "acc_iou50": 83.11, "head_recall_top1": 81.93, "head_recall_top5": 94.56,
    }  # fmt: skip
    assert report["paper"]["Shikra 7B, 224 px"]["val"] == {"acc_iou50": 82.27} and "sequential" not in report["paper"]
    (line,) = (line for line in table(report).splitlines() if "Octopus, 336 px" in line)
    assert "(84.25)" in line and "(82.13)" in line and "(95.95)" in line
    for part in (refcoco(world, limit=len(data)), refcoco(world, match="left of")):
        answering(part, right)
        assert not evaluate_refcoco(octopus, part)["paper"]


def test_each_official_split_is_known_by_its_size():
    assert len(evaluating_refcoco.SPLITS) == 8 == len({*evaluating_refcoco.SPLITS})
    named = evaluating_refcoco.published({"testB": "RefCOCO+"})
    assert [system["testB"]["acc_iou50"] for system in named.values()] == [75.12, 76.02, 72.12]
    assert named["Octopus, 224 px"]["testB"] == {"acc_iou50": 75.12}


def test_chance_is_the_mean_over_the_known_boxes():
    assert chance_metrics([A, B, FAR, A], [A]) == {"acc_iou50": 0.5, "mean_iou": 0.5}


def test_answers_do_not_depend_on_the_batch_and_images_are_encoded_once(octopus, world, monkeypatch):
    encoded, vision = [], octopus.vision.forward
    monkeypatch.setattr(octopus.vision, "forward", lambda pixels: encoded.append(len(pixels)) or vision(pixels))
    many, few = (predict(octopus, [refcoco(world, limit=9)], Options(size)) for size in (9, 2))
    assert [a.text for _, a in many.pairs[0]] == [a.text for _, a in few.pairs[0]]
    assert sum(encoded) == 2 * len({example.image for example, _ in many.pairs[0]}) < 18
    example, answer = many.pairs[0][-1]
    (alone,) = ground(octopus, [(Image.open(example.image), example.instruction)], 2)
    assert answer.text.startswith(alone.text)


@pytest.mark.parametrize("wrong", [False, True])
def test_several_objects_must_all_be_found(octopus, world, answering, wrong):
    data = Instructions(str(world / "llava/instruct_val.json"), str(world))
    last = lambda e: [*pieces(e)[:-1], FAR]  # noqa: E731
    answering(data, lambda e: GroundedAnswer("", last(e) if wrong else pieces(e)))
    report = evaluate_instructions(octopus, data, Options(64))
    found = report["octopus"]
    assert {"text", "1_object", "2_objects"} <= found.keys() and next(iter(found)) == "text"
    assert found.pop("all")["seconds"] > 0
    assert all(figures["all_found"] == (0 if wrong else 100) for name, figures in found.items() if name != "text")
    assert found["text"]["words"] == (0 if wrong else 100) and "all_found" not in found["text"]
    counts = [report[f"answers_{name}"] for name in found]
    assert sum(counts) == report["examples"] and "chance" not in report


def test_pope_counts_what_does_not_say_no():
    texts, labels = ["yes", "Yes, it is", "no", "not so", "perhaps", "yes"], [True, True, True, False, True, False]
    found = figures(texts, labels)
    assert found["precision"] == pytest.approx(75) and found["recall"] == pytest.approx(75)
    assert found["accuracy"] == pytest.approx(400 / 6) and found["f1"] == pytest.approx(75)
    assert found["yes"] == pytest.approx(400 / 6) and found["neither"] == pytest.approx(100 / 6)
    assert coin([True, False, False, False])["precision"] == 25


def test_pope_of_right_and_of_wrong_answers(octopus, world, answering):
    data = Pope(str(world / "pope/coco_pope_random.json"), str(world / "refcoco/images"), limit=8)
    for yes, no, share in (("yes", "no", 100), ("no", "yes", 0)):
        answering(data, lambda e, yes=yes, no=no: GroundedAnswer("", [yes if e.answer == ("yes",) else no]))
        report = evaluate_pope(octopus, data)
        own, chance = (report[who]["coco_pope_random"] for who in ("octopus", "chance"))
        assert own["accuracy"] == own["f1"] == share and own["yes"] == 50 == chance["accuracy"] and own["neither"] == 0


@pytest.fixture
def three(world, tmp_path):
    """POPE's three files of a few questions each, about the same images."""
    lines = (world / "pope/coco_pope_random.json").read_text().splitlines()[:12]
    for name in evaluating_pope.OFFICIAL:
        (tmp_path / f"{name}.json").write_text("\n".join(lines))
    return [Pope(str(tmp_path / f"{name}.json"), str(world / "refcoco/images")) for name in evaluating_pope.OFFICIAL]


def test_popes_splits_are_one_run_with_a_mean(octopus, three, answering, monkeypatch):
    encoded, vision = [], octopus.vision.forward
    monkeypatch.setattr(octopus.vision, "forward", lambda pixels: encoded.append(len(pixels)) or vision(pixels))
    answering(three, lambda e: GroundedAnswer("", [e.answer[0] if e.key.endswith(("0", "1", "2")) else "yes"]))
    report = evaluate_pope(octopus, three, Options(5))
    own = report["octopus"]
    assert [*own] == [*evaluating_pope.OFFICIAL, "mean"] and own["mean"].keys() == {"f1"}
    assert own["mean"]["f1"] == pytest.approx(sum(own[name]["f1"] for name in evaluating_pope.OFFICIAL) / 3)
    assert report["examples"] == 36 and report["examples_coco_pope_popular"] == 12 and not report["paper"]
    assert sum(encoded) == report["images"] < 12
    assert report["data"] == "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json"


def test_questions_of_several_kinds_have_figures_by_kind(octopus, world, answering):
    data = Pope(str(world / "attributes/val.json"), str(world / "refcoco/images"), limit=40)
    wrong = sorted({data.kinds[example.key] for example in data})[0]
    answering(data, lambda e: GroundedAnswer("", [e.answer[0] if data.kinds[e.key] != wrong else "neither"]))
    report = evaluate_pope(octopus, data)
    own = report["octopus"]
    assert report["evaluation"] == "yes-or-no questions" and len(own) > 2 and own.keys() == report["chance"].keys()
    assert own[f"val/{wrong}"]["neither"] == 100 > own["val"]["neither"] > 0 and 0 < own["val"]["accuracy"] < 100
    assert all(own[name]["accuracy"] == 100 for name in own if name not in ("val", f"val/{wrong}"))


def test_answers_count_as_yes_or_no_by_popes_rule():
    for text, yes in (("Yes", 1), ("There is a dog", 1), ("No, there is none", 0), ("There is not", 0), ("yes. not so", 1)):
        assert evaluating_pope.says_yes(text) == yes, text


def test_popes_published_figures_stand_beside_its_three_files_alone(octopus, three, answering, monkeypatch):
    monkeypatch.setattr(evaluating_pope, "OFFICIAL", {name: {12} for name in evaluating_pope.OFFICIAL})
    answering(three, lambda e: GroundedAnswer("", ["yes"]))
    report = evaluate_pope(octopus, three)
    assert report["paper"] == evaluating_pope.PAPER and "(84.8)" in table(report)
    assert evaluating_pope.official(three) and not evaluating_pope.official(three[:2])
    assert not evaluating_pope.official([*three[:2], Pope(str(three[2].file), "", limit=12)])
    with pytest.raises(UserError, match="two files of this name"):
        evaluate_pope(octopus, [three[0], three[0]])


def test_examples_of_too_many_objects_are_counted(world, tmp_path):
    data = Instructions(str(world / "llava/instruct_val.json"), str(world))
    one = Octopus.load(num_queries=1, decoder_width=16, decoder_layers=1, heads=2)
    many = sum(len(e.meant) > 1 for e in data)
    predictions = predict(one, [data], Options(64))
    assert predictions.skipped["examples of more objects than queries"] == many == len(data) - len(predictions.pairs[0]) > 0
    talk = [{"from": "human", "value": "where?"}, {"from": "gpt", "value": "[0.1,0.1,0.2,0.2][0.3,0.3,0.4,0.4]"}]
    (tmp_path / "several.json").write_text(json.dumps([{"image": data.examples[0].image, "conversations": talk}]))
    with pytest.raises(UserError, match="more objects than the model's 1 object queries"):
        predict(one, [Instructions(str(tmp_path / "several.json"), "")], Options())


def test_lost_images_are_counted(octopus, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("none")
    rows = [{"question_id": i, "image": f"{c}.png", "text": "is there a star?", "label": "no"} for i, c in enumerate("abc")]
    (tmp_path / "pope.json").write_text("\n".join(map(json.dumps, rows)))
    data = Pope(str(tmp_path / "pope.json"), str(tmp_path))
    report = evaluate_pope(octopus, data, Options(max_lost=0.8))
    assert report["skipped"]["images missing"] == report["skipped"]["images broken"] == report["examples"] == 1
    assert report["skipped"]["examples with a lost image"] == 2 == len(report["lost"])
    with pytest.raises(UserError, match="1 of 3 images cannot be had"):
        evaluate_pope(octopus, data, Options(max_lost=0.1))


@pytest.fixture
def verbs(world):
    """The words of each verb but for the checkpoint."""
    coco = world / "refcoco"
    return {
        "refcoco": [coco / "refs(unc).p", "--instances", coco / "instances.json", "--images", coco / "images"],
        "pope": [world / "pope/coco_pope_random.json", "--images", coco / "images"],
        "instructions": [world / "llava/instruct_val.json", "--images", world],
    }


@pytest.mark.parametrize(
    ("name", "who", "setting", "figure"),
    [
        ("refcoco", "octopus", "val", "head_recall_top5"),
        ("refcoco", "sequential", "val", "acc_iou50"),
        ("pope", "octopus", "coco_pope_random", "f1"),
        ("instructions", "octopus", "1_object", "all_found"),
        ("instructions", "sequential", "text", "words"),
    ],
)
def test_each_verb_prints_a_table_and_writes_json(name, who, setting, figure, checkpoints, verbs, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert main(["eval", name, *map(str, verbs[name]), "--ckpt", checkpoints[who], "--limit", "12", "--json", str(out)]) == 0
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert 0 <= report[who][setting][figure] <= 100 and report["evaluation"] == name and report["examples"] == 12
    assert {"protocol", "skipped", "checkpoint", "versions", "data", "images"} <= report.keys()
    assert who in printed and setting in printed and figure in printed and "R@1" not in printed
    assert ("head_recall_top1" in printed) == ((name, who) == ("refcoco", "octopus"))


def test_the_digest_changes_with_any_parameter(checkpoints, octopus):
    again = load_octopus(checkpoints["octopus"])
    before = again.fingerprint()
    assert before == octopus.fingerprint() != load_octopus(checkpoints["sequential"]).fingerprint()
    again.lm.blocks[0].fc1.weight.data.mul_(1.1)
    after = again.fingerprint()
    again.queries.data[0, 0] += 1e-4
    assert len({before, after, again.fingerprint()}) == 3


def test_what_is_wrong_is_one_line(checkpoints, verbs, tmp_path, capsys):
    Fromage.load(k=1, q=8).save_pretrained(tmp_path / "fromage")
    refs, ckpt = verbs["refcoco"], checkpoints["octopus"]
    for name, words, said in (
        ("refcoco", [*refs, "--split", "testA", "--ckpt", ckpt], "no split testA"),
        ("refcoco", [*refs, "--split", "val", "all", "--ckpt", ckpt], "all"),
        ("refcoco", [*refs, "--question", "where?", "--ckpt", ckpt], "must hold {} once"),
        ("refcoco", [tmp_path / "no.p", *refs[1:], "--ckpt", tmp_path / "no.ckpt"], "no.p: no such file"),
        ("refcoco", [*refs, "--ckpt", tmp_path / "fromage"], "is of FROMAGe, and not of Octopus"),
        ("refcoco", [*refs, "--ckpt", ckpt, "--device", "cuda:99"], "device cuda:99"),
        ("pope", [refs[0], *verbs["pope"][1:], "--ckpt", ckpt], "save it as UTF-8"),
        ("instructions", [refs[2], *verbs["instructions"][1:], "--ckpt", ckpt], "is boxes of COCO"),
    ):
        assert main(["eval", name, *map(str, words)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("fromage: ") and said in error
