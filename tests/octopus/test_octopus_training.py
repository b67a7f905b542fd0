"""The three stages under Lightning on a small world: what each trains, what it keeps, and what the next takes up."""

from pathlib import Path

import pytest
import torch
import yaml

from fromage.cli import main
from fromage.configs import config_folder, find_config
from fromage.errors import UserError
from fromage.octopus import load_octopus
from fromage.octopus.decoding import ground
from fromage.toy import octopus_tour

STAGES = [yaml.safe_load((config_folder() / f"octopus_stage{i}.yaml").read_text()) for i in (1, 2, 3)]
QUICK = [
    "--trainer.max_steps=3",
    "--trainer.val_check_interval=3",
    "--data.batch_size=4",
    "--trainer.enable_progress_bar=false",
]
QUICK += ["--trainer.limit_val_batches=1", "--data.val_batch_size=8"]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Folder in which all stages and the counterpart had three steps."""
    out = tmp_path_factory.mktemp("octopus")
    (out / "world").symlink_to(world)
    for configs in (*((stage,) for stage in octopus_tour.STAGES), octopus_tour.SEQUENTIAL):
        octopus_tour.train(out, configs, QUICK)
    return out


def state(folder, stage):
    return torch.load(folder / stage / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_each_stage_trains_its_part_and_keeps_what_came_before(trained):
    parts = {s: {name.split(".")[1] for name in state(trained, s)} for s in ("stage1", "stage2", "stage3", "sequential")}
    assert parts["stage1"] == {"visual_prefix"}
    assert parts["stage2"] == {"visual_prefix", "queries", "recognizer", "index"}
    assert parts["stage3"] == parts["stage2"] | {"lm"}
    assert parts["sequential"] == {"visual_prefix", "lm"}
    one, two, three = (state(trained, s) for s in ("stage1", "stage2", "stage3"))
    prefix = "model.visual_prefix.weight"
    assert torch.equal(one[prefix], two[prefix]) and not torch.equal(two[prefix], three[prefix])
    assert not torch.equal(two["model.queries"], three["model.queries"])


def test_a_checkpoint_answers(trained):
    model = load_octopus(str(trained / "stage3" / "checkpoints" / "last.ckpt"))
    picture = next((trained / "world" / "refcoco" / "images").glob("*.jpg"))
    answer = ground(model, [(picture, "where is the star?")], 4)[0]
    assert len(answer.candidates) == 16 and not model.training
    same = load_octopus(str(trained / "stage3" / "checkpoints" / "last.ckpt"))
    assert ground(same, [(picture, "where is the star?")], 4)[0] == answer


def test_the_run_has_a_report_with_figures_of_greedy_answers(trained):
    report = next((trained / "stage3").glob("version_*/report.md")).read_text()
    assert "| outcome | finished |" in report and "val/acc_iou50" in report and "val/head_recall_top5" in report


def test_a_run_that_was_killed_goes_on_and_one_that_ended_is_left_alone(tmp_path, monkeypatch):
    fits = []

    def fit(words):
        fits.append(words)
        (tmp_path / "stage1" / octopus_tour.CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stage1" / octopus_tour.CHECKPOINT).touch()
        if len(fits) < 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(octopus_tour, "fitting", fit)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            octopus_tour.train_once(tmp_path, "stage1", octopus_tour.STAGES[:1])
        assert octopus_tour.trained(tmp_path, "stage1") is None
    for _ in range(2):
        checkpoint = octopus_tour.train_once(tmp_path, "stage1", octopus_tour.STAGES[:1])
        assert octopus_tour.trained(tmp_path, "stage1") == checkpoint
    assert ["--ckpt_path=last" in words for words in fits] == [False, True, True]


def test_what_belongs_to_another_model_is_refused(trained, capsys, tmp_path):
    with pytest.raises(UserError, match="another architecture"):
        octopus_tour.train(
            trained,
            (octopus_tour.STAGES[1],),
            [*QUICK, "--model.c=32", f"--model.init={trained}/stage2/checkpoints/last.ckpt"],
        )
    words = ["fit", "--config=octopus_toy2.yaml", "--model.n=0"]
    assert main(words) == 2 and "choose stage 1 or 3" in capsys.readouterr().err


def test_adapters_are_all_that_is_trained_of_the_language_model(trained):
    octopus_tour.train(
        trained,
        (octopus_tour.STAGES[2],),
        [*QUICK, "--model.low_rank=2", f"--trainer.callbacks.init_args.dirpath={trained}/lora"],
    )
    kept = torch.load(trained / "lora" / "last.ckpt", weights_only=True)["state_dict"]
    of_lm = [name for name in kept if name.startswith("model.lm.")]
    assert of_lm and all("lora_" in name for name in of_lm)
    assert len(ground(load_octopus(str(trained / "lora" / "last.ckpt")), [(torch.ones(16, 384), "star")], 3)) == 1


def test_the_full_size_stages_have_the_papers_values():
    models = [config["model"]["init_args"] for config in STAGES]
    assert [m["stage"] for m in models] == [1, 2, 3] and [m["lr"] for m in models] == [1e-4, 1e-4, 2e-5]
    assert {(m["n"], m["after"], m["lm"], m["vision"]) for m in models} == {(64, 16, "lmsys/vicuna-7b-v1.5", "ViT-L-14-336")}
    saved = [config["trainer"]["callbacks"][1]["init_args"]["dirpath"] + "/last.ckpt" for config in STAGES]
    assert [m.get("init") for m in models] == [None, *saved[:2]]
    sequential = yaml.safe_load(Path(find_config("octopus_sequential.yaml")).read_text())["model"]["init_args"]
    assert sequential["n"] == 0 and "stage1" in sequential["init"]
