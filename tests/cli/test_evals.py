"""`fromage eval`: from a checkpoint and the files to a table and a JSON file; and the benchmark beside it."""

import json
import sys
from pathlib import Path

import pytest

from fromage.cli.main import main
from fromage.models.fromage import Fromage

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    Fromage.load(k=2, q=32).save_pretrained(out)
    return str(out)


@pytest.fixture
def words(world):
    """The words of each verb but for the checkpoint."""
    coco, flickr, visdial = world / "coco", world / "flickr30k", world / "visdial"
    said, dense = visdial / "visdial_1.0_val.json", visdial / "visdial_1.0_val_dense_annotations.json"
    composed = world / "composed"
    listed, photos = composed / "circo" / "annotations", composed / "circo" / "unlabeled2017"
    of_cirr = [composed / "cirr" / name for name in ("captions/cap.rc2.val.json", "image_splits/split.rc2.val.json")]
    of_chatir = [composed / "chatir" / name for name in ("VisDial_v1.0_queries_val.json", "Search_Space_val_50k.json")]
    return {
        "coco": [coco / "annotations" / "captions_val2017.json", "--images", coco / "val2017"],
        "flickr30k": [flickr / "dataset_flickr30k.json", "--images", flickr / "flickr30k-images"],
        "vist": [world / "vist" / "sis" / "val.story-in-sequence.json", "--images", world / "vist" / "images" / "val"],
        "visdial": [said, "--dense", dense, "--images", visdial / "images" / "val", "--no-answers"],
        "few-shot": ["--world", world, "--shots", "1"],
        "circo": [listed / "val.json", "--gallery", listed / "image_info_unlabeled2017.json", "--images", photos],
        "cirr": [of_cirr[0], "--gallery", of_cirr[1], "--images", composed / "cirr"],
        "chatir": [*of_chatir[:1], "--gallery", of_chatir[1], "--images", composed / "circo"],
    }


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("coco", {"text_to_image", "image_to_text"}),
        ("flickr30k", {"text_to_image", "image_to_text"}),
        ("vist", {"1_caption", "5_captions", "5_captions_4_images", "4_images"}),
        ("visdial", {"0_rounds", "10_rounds", "10_rounds_authors"}),
        ("few-shot", {"captioning_1", "questions_1"}),
        ("circo", {"composed", "composed_reference_kept"}),
        ("cirr", {"all", "subset"}),
        ("chatir", {"round_0", "round_10"}),
    ],
)
def test_each_verb_prints_a_table_and_writes_json(name, settings, ckpt, words, tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    assert main(["eval", name, *map(str, words[name]), "--ckpt", ckpt, "--limit", "5", "--json", str(out)]) == 0
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert settings <= report["fromage"].keys() and report["evaluation"] == name
    assert {"protocol", "skipped", "checkpoint", "versions", "data"} <= report.keys()
    assert all(setting in printed for setting in settings)
    if name != "few-shot":
        first = min(settings)
        assert report["clip"][first].keys() == report["chance"][first].keys() == report["fromage"][first].keys()
        assert report["gallery"] and f"| fromage {report['checkpoint']} |" in printed


def test_what_is_wrong_is_one_line(ckpt, words, tmp_path, capsys):
    coco, vist = words["coco"], words["vist"]
    (tmp_path / "a.json").mkdir()
    for line, said in (
        (["coco", vist[0], *coco[1:]], "stories in sequence of VIST"),
        (["vist", *vist[:2], tmp_path], "images cannot be had"),
        (["coco", tmp_path / "no.json", *coco[1:]], "no.json"),
        (["coco", *coco, "--json", f"{tmp_path}/a.json"], "no file"),
        (["coco", *coco, "--json", coco[0] / "deep" / "a.json"], "no folder that can be written to"),
        (["visdial", *words["visdial"], "--scores", coco[0]], "no folder that can be written to"),
    ):
        assert main(["eval", *map(str, line), "--ckpt", ckpt]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("fromage: ") and said in error
    for wrong in (("--limit", "0"), ("--batch-size", "0"), ("--workers", "-1")):
        assert main(["eval", "coco", *map(str, coco), "--ckpt", ckpt, *wrong]) == 2


def test_the_benchmark_compares_equal_things(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_evals

    monkeypatch.setattr(bench_evals, "CANDIDATES", 5)
    monkeypatch.setattr(bench_evals, "ROUNDS", (1, 2))
    out = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench_evals.py", "--preset", "tiny", "--rounds", "1", "--json", str(out)])
    bench_evals.main()
    report = json.loads(out.read_text())
    assert report["speedup_prefix_cache"] > 0 and report["max_score_error"] < 1e-3
    assert report["prompt_tokens"] == [12, 27] and "prefix cache" in capsys.readouterr().out
