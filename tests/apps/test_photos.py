"""The tour on captioned photographs, here of toy scenes by the toy towers: all parts, none twice, none of another's."""

import json
import shutil
from pathlib import Path

import pytest

from fromage.apps import photos as tour
from fromage.apps.tours import CHECKPOINT, FINISHED, once
from fromage.checkpoints.run_folder import BEFORE
from fromage.cli.main import main
from fromage.errors import UserError
from fromage.models.fromage import load_model
from fromage.retrieval.open_index import load_index

FEW = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--trainer.callbacks.init_args.every_n_train_steps=2"]
FEW += ["--data.batch_size=8", "--trainer.enable_progress_bar=false", "--model.q=16"]


@pytest.fixture(scope="module")
def coco(world):
    return world / "coco" / "annotations" / "captions_val2017.json", world / "coco" / "val2017"


@pytest.fixture(scope="module")
def made(coco, tmp_path_factory):
    out = tmp_path_factory.mktemp("photos") / "tour [1]"  # no pattern
    return out, tour.photos(*coco, out, "toy", "toy", FEW)


def test_every_part_leaves_its_result(made):
    out, report = made
    assert 0 < report["held_out"] < 30 and 0 <= report["fromage"]["t2i_r1"] <= 100
    assert json.loads((out / "report.json").read_text()) == report
    assert all((out / name).stat().st_size > 1000 for name in ("captions.png", "searches.png"))
    assert main(["search", "a red star", "--index", str(out / "index")]) == 0


def test_nothing_is_done_twice(made, coco, monkeypatch):
    out, report = made
    for name in ("pack_coco", "run_lightning", "build_index"):
        monkeypatch.setattr(tour, name, None)
    assert tour.photos(*coco, out, "toy", "toy", FEW)["fromage"] == report["fromage"]
    assert tour.photos(*coco, out, "toy", "toy")["fromage"] == report["fromage"], "without options any will do"
    with pytest.raises(UserError, match=r"begun with other options.*max_steps=4.*give the same"):
        tour.photos(*coco, out, "toy", "toy", [*FEW, "--model.lr=1e-4"])


def test_a_run_that_was_removed_is_made_again_with_its_index(made, coco, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(made[0], out)
    former = load_index(out / "index").fingerprint
    shutil.rmtree(out / "run")
    for part in ("train", "val"):  # where the copy's features are from
        about = out / "features" / part / "features.json"
        about.write_text(about.read_text().replace(str(made[0]), str(out)))
    tour.photos(*coco, out, "toy", "toy", [*FEW, "--seed_everything=5", "--model.seed=5"])
    assert load_index(out / "index").fingerprint == load_model(out / "run" / CHECKPOINT).fingerprint() != former


def test_photographs_that_judge_are_a_share_that_stays(made, coco, tmp_path):
    for odd in (0, 1, float("nan")):
        with pytest.raises(UserError, match="val_fraction"):
            tour.photos(*coco, tmp_path / "new", "toy", "toy", val_fraction=odd)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"of another source \(val_fraction 0\.1 there, 0\.2 here"):
        tour.photos(*coco, made[0], "toy", "toy", FEW, val_fraction=0.2)


def test_options_that_were_wrong_can_be_corrected(coco, tmp_path):
    out = tmp_path / "tour"
    for given in (
        (tmp_path / "none.json", coco[1], out, "toy", "toy", FEW),
        (coco[0], tmp_path, out, "toy", "toy", FEW),
        (*coco, out, "toy", "toy2", FEW),
        (*coco, out, "toy2", "toy", FEW),
        (*coco, out, "toy", "toy", [*FEW, "--trainer.steps=3"]),
    ):
        with pytest.raises((UserError, SystemExit)):
            tour.photos(*given)
    assert tour.photos(*coco, out, "toy", "toy", FEW)["held_out"]
    with pytest.raises(UserError, match=r"of another pair of towers \(lm 'toy' there, 'toy2' here"):
        tour.photos(*coco, out, "toy2", "toy", FEW)


def test_only_the_photographs_that_are_named_count(coco, tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    content = json.loads(coco[0].read_text())
    for image in content["images"]:
        (folder / "deep" / image["file_name"]).symlink_to(coco[1] / image["file_name"])
        image["file_name"] = f"deep/{image['file_name']}"
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps(content))
    before = tour.source_of(captions, folder)
    for stray in (folder / ".DS_Store", folder / "deep" / "Thumbs.db"):
        stray.touch()
    assert tour.source_of(captions, folder) == before
    file = folder / content["images"][3]["file_name"]
    file.unlink()
    assert tour.source_of(captions, folder) != before
    file.write_bytes(b"another")
    assert tour.source_of(captions, folder)["captions"] == before["captions"] and tour.source_of(captions, folder) != before
    assert tour.source_of(tmp_path / "none.json", folder) == tour.source_of(captions, tmp_path / "none") == {}


def test_a_tour_goes_on_where_its_photographs_are_gone_or_have_moved(made, coco, tmp_path, capsys):
    shutil.copytree(coco[1], tmp_path / "moved")
    for images, told in ((tmp_path / "moved", False), (tmp_path / "none", True)):
        assert tour.photos(coco[0], images, made[0], "toy", "toy", FEW)["fromage"] == made[1]["fromage"]
        assert ("going on with what was packed" in capsys.readouterr().out) == told
    with pytest.raises(UserError, match=r"val_fraction 0\.1 there, 0\.4 here"):
        tour.photos(coco[0], tmp_path / "none", made[0], "toy", "toy", FEW, val_fraction=0.4)


def test_a_study_takes_no_run_of_other_options(tmp_path):
    run = tmp_path / "run"
    checkpoint = run / CHECKPOINT

    def fit(again):
        asked.append(again)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.touch()

    asked = []
    assert once(run, ["--a=1"], fit) == once(run, ["--a=1"], fit) == once(run, None, fit) == checkpoint
    assert asked == [[]]
    with pytest.raises(UserError, match="begun with other options"):
        once(run, [], fit)
    (run / FINISHED).unlink()
    checkpoint.rename(checkpoint.with_name(BEFORE))
    once(run, ["--a=1"], fit)
    assert asked == [[], ["--ckpt_path=last"]], "the one before the last will do"


def test_a_run_that_was_killed_goes_on(coco, tmp_path, monkeypatch):
    def killed(words):
        fit([*words, "--trainer.max_steps=2"])
        raise KeyboardInterrupt

    fit = tour.run_lightning
    monkeypatch.setattr(tour, "run_lightning", killed)
    with pytest.raises(KeyboardInterrupt):
        tour.photos(*coco, tmp_path / "tour", "toy", "toy", FEW)
    seen = []
    monkeypatch.setattr(tour, "run_lightning", lambda words: seen.append(words) or fit(words))
    held_out = tour.photos(*coco, tmp_path / "tour", "toy", "toy", FEW)["held_out"]
    assert "--ckpt_path=last" in seen[0]
    assert f"--data.batch_size={60 - held_out}" in seen[0], "as many as there are, where they are fewer than a batch"


def test_images_that_come_later_are_packed_by_the_same_command(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tour, "store_features", lambda place, *given, **options: pytest.fail(f"{len(packed(place))} shards"))
    words = [
        "photos",
        str(coco[0]),
        "--images",
        str(tmp_path / "i"),
        "--out",
        str(tmp_path / "o"),
        "--lm=toy",
        "--vision=toy",
    ]
    (tmp_path / "i").mkdir()
    for _ in range(2):
        assert main(words) == 2
        assert "no image could be packed (missing image: 60" in capsys.readouterr().err.splitlines()[-1]
    for file in coco[1].iterdir():
        (tmp_path / "i" / file.name).symlink_to(file)
    with pytest.raises(pytest.fail.Exception, match="1 shards"):
        main(words)


def packed(place):
    return list(Path(place).glob("*.tar"))


def test_a_folder_of_other_photographs_is_refused(made, coco, tmp_path):
    with pytest.raises(UserError, match="--out"):
        tour.photos(coco[0], tmp_path, made[0], "toy", "toy")


def test_what_is_missing_is_one_line(coco, tmp_path, capsys):
    words = ["--lm", "toy", "--vision", "toy", "--out", str(tmp_path / "tour")]
    assert main(["photos", str(tmp_path / "none.json"), "--images", str(coco[1]), *words]) == 2
    assert "none.json" in capsys.readouterr().err
    assert main(["photos", str(coco[0]), "--images", str(tmp_path), *words]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("fromage: ")


def test_captions_or_photographs_that_changed_are_not_passed_over(made, coco, tmp_path):
    captions, images = tmp_path / "captions.json", tmp_path / "images"
    shutil.copytree(coco[1], images)
    shutil.copy(coco[0], captions)
    before = tour.source_of(captions, images)
    assert before == tour.source_of(captions, images) and tour.source_of(tmp_path / "none.json", images) == {}
    with (images / next(images.iterdir()).name).open("ab") as photograph:
        photograph.write(b" ")
    touched = tour.source_of(captions, images)
    captions.write_text(captions.read_text().replace("a ", "the ", 1))
    corrected = tour.source_of(captions, images)
    assert touched["captions"] == before["captions"] != corrected["captions"]
    assert before["photographs"] != touched["photographs"]
    with pytest.raises(UserError, match=r"another source.*name another folder: --out"):
        tour.SOURCE.require(made[0] / "shards", corrected)


def test_a_file_of_the_same_name_is_kept(coco, tmp_path):
    own = tmp_path / "photos.json"
    shutil.copy(coco[0], own)
    before = own.read_bytes()
    with pytest.raises(UserError, match="something else than a tour"):
        tour.photos(own, coco[1], tmp_path, "toy", "toy", FEW)
    assert own.read_bytes() == before


def test_a_tour_of_an_earlier_version_says_so(made, coco, tmp_path):
    out = tmp_path / "tour"
    shutil.copytree(made[0], out)
    former = {"lm": "toy", "vision": "toy", "captions": "c", "images": "i", "val_fraction": 0.1}
    (out / "photos.json").write_text(json.dumps(former))
    told = json.loads((out / "shards" / "source.json").read_text())
    del told["val_fraction"]
    (out / "shards" / "source.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"of an earlier version\); name another folder: --out"):
        tour.photos(*coco, out, "toy", "toy", FEW)
