"""The three stages under Lightning on a small world: what each trains, what it keeps, and what the next takes up."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import yaml
from tiny_octopus import build

from fromage.apps import octopus_demo as octopus_tour
from fromage.cli.main import main
from fromage.data.workers import WorkerLoader
from fromage.errors import UserError
from fromage.models.vision.registry import load_patches
from fromage.octopus import Flickr30kEntities, OctopusData, OctopusModule, RefCOCO, load_octopus
from fromage.octopus.checkpoint import RENAMED
from fromage.octopus.dataset import GroundingDataset, collated
from fromage.octopus.decoding import ground
from fromage.octopus.examples import Example
from fromage.octopus.lora import add_lora
from fromage.toy.world import VERSION
from fromage.training.checkpoint_io import SafeCheckpoint
from fromage.training.configs import config_folder, find_config

STAGES = [yaml.safe_load((config_folder() / f"octopus_stage{i}.yaml").read_text()) for i in (1, 2, 3)]
QUICK = [
    "--trainer.max_steps=3",
    "--trainer.val_check_interval=3",
    "--data.batch_size=4",
    "--trainer.enable_progress_bar=false",
]
SMALL = {"lm": "toy", "vision": "toy", "decoder_layers": 1, "heads": 2, "dtype": "float32"}
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
    checkpoint = torch.load(folder / stage / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["kind"] == "octopus"
    return checkpoint["state_dict"]


def test_the_model_is_made_on_the_host_whatever_device_lightning_asks_for():
    module = OctopusModule(stage=2, num_queries=8, **SMALL)
    with torch.device("meta"):
        module.configure_model()
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"cpu"}


def test_an_example_that_two_devices_have_counts_once(monkeypatch):
    module, logged = OctopusModule(stage=2, num_queries=8, **SMALL), {}
    monkeypatch.setattr(module, "log_dict", lambda figures, **how: logged.update(figures))
    right, wrong = ("0:1", {"words": 1.0}), ("1:1", {"words": 0.0})
    module._metrics = [right]
    monkeypatch.setattr("fromage.octopus.module.gathered", lambda items: [*items, wrong, *items])
    module.on_validation_epoch_end()
    assert logged == {"val/words": 50.0}


def test_examples_of_two_sources_that_have_one_name_are_two(trained):
    world = trained / "world"
    files = [str(world / "refcoco" / name) for name in ("refs(unc).p", "instances.json", "images")]
    data = OctopusData(val=[RefCOCO(*files, split="val", limit=3)] * 2, batch_size=4)
    data.setup("validate")
    assert len({example.key for example in data.examples["val"]}) == 6


def test_each_stage_trains_its_part_and_keeps_what_came_before(trained):
    parts = {s: {name.split(".")[1] for name in state(trained, s)} for s in ("stage1", "stage2", "stage3", "sequential")}
    assert parts["stage1"] == {"visual_prefix"}
    assert parts["stage2"] == {"visual_prefix", "queries", "recognizer", "index_tokens"}
    assert parts["stage3"] == parts["stage2"] | {"lm"}
    assert parts["sequential"] == {"visual_prefix", "lm"}
    one, two, three = (state(trained, s) for s in ("stage1", "stage2", "stage3"))
    prefix = "model.visual_prefix.weight"
    assert torch.equal(one[prefix], two[prefix]) and not torch.equal(two[prefix], three[prefix])
    assert not torch.equal(two["model.queries"], three["model.queries"])


def test_a_checkpoint_answers(trained):
    model = load_octopus(str(trained / "stage3" / "checkpoints" / "last.ckpt"))
    image = next((trained / "world" / "refcoco" / "images").glob("*.jpg"))
    answer = ground(model, [(image, "where is the star?")], 4)[0]
    assert len(answer.candidates) == 8 and not model.training
    same = load_octopus(str(trained / "stage3" / "checkpoints" / "last.ckpt"))
    assert ground(same, [(image, "where is the star?")], 4)[0] == answer


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

    monkeypatch.setattr(octopus_tour, "run_lightning", fit)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            octopus_tour.train_once(tmp_path, "stage1", octopus_tour.STAGES[:1])
        assert octopus_tour.trained(tmp_path, "stage1") is None
    for _ in range(2):
        checkpoint = octopus_tour.train_once(tmp_path, "stage1", octopus_tour.STAGES[:1])
        assert octopus_tour.trained(tmp_path, "stage1") == checkpoint
    assert ["--ckpt_path=last" in words for words in fits] == [False, True, True]


def test_paths_are_put_in_place_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(octopus_tour, "run_lightning", lambda words: None)
    study = Path("runs/octopus_study")
    octopus_tour.train(study / "seed0", octopus_tour.STAGES[2:], shared=study)
    placed = (study / "seed0" / "configs" / "octopus_toy3.yaml").read_text()
    assert "refs: runs/octopus_study/world/refcoco" in placed and "features: runs/octopus_study/patches" in placed
    assert "init: runs/octopus_study/seed0/stage2 " in placed and "seed0_study" not in placed


def test_a_world_with_as_many_images_is_kept_and_what_is_none_is_told(tmp_path, monkeypatch):
    made = []
    (tmp_path / "world").mkdir()
    about = tmp_path / "world" / "world.json"
    with monkeypatch.context() as patch:
        patch.setattr(octopus_tour, "make_world", lambda out, **counts: made.append(out))
        about.write_text(json.dumps({"version": VERSION, "counts": {"refs": 6000, "train": 8192}}))
        octopus_tour.make(tmp_path)
        assert made == []
        for version, refs in ((VERSION, 5), (VERSION - 1, 6000)):
            about.write_text(json.dumps({"version": version, "counts": {"refs": refs}}))
            octopus_tour.make(tmp_path)
            assert made.pop() == tmp_path / "world" and not made
    about.write_text("[torn")
    with pytest.raises(UserError, match="cannot be read as a toy world"):
        octopus_tour.make(tmp_path)


def test_in_the_place_of_an_image_that_cannot_be_decoded_stands_the_next(folder, tmp_path, caplog):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    whole = str(min(folder.glob("*.png")))
    examples = [Example(name, path, "star", ("yes",), ()) for name, path in (("bad", str(broken)), ("good", whole))]
    rows = [[[example]] for example in examples]
    transform = load_patches("toy").transform
    dataset = GroundingDataset(rows, transform, None, 0.5, replace=True)
    assert [dataset[i][0] for i in (0, 1)] == [rows[1], rows[1]] and "bad" in caplog.text
    unmoved = GroundingDataset(rows, transform, None, 0.5, replace=False)
    found = [unmoved[i] for i in (0, 1)]
    assert found[0] is None and found[1][0] == rows[1], "in validation no example counts twice"
    assert collated(lambda kept: [row for row, _ in kept], found) == [rows[1]] and collated(list, [None]) is None
    with pytest.raises(UserError, match=r"1 of 1 images cannot be had.*broken\.jpg \(broken\)"):
        GroundingDataset(rows[:1], transform, None, 0.05, replace=True)[0]


def test_boxes_to_point_at_are_refused_where_nothing_is_asked_yet(trained, world):
    coco = world / "refcoco"
    source = RefCOCO(str(coco / "refs(unc).p"), str(coco / "instances.json"), str(coco / "images"))
    module = OctopusModule(
        stage=1, lm="toy", vision="toy", num_queries=4, decoder_width=16, decoder_layers=1, heads=2, dtype="float32"
    )
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(UserError, match="stage 1 has no object queries"):
        trainer.fit(module, OctopusData([source], batch_size=4, workers=0))
    with pytest.raises(UserError, match="of stage 1"):
        load_octopus(str(trained / "stage1" / "checkpoints" / "last.ckpt"))


def test_other_settings_of_what_recognises_are_refused(trained):
    words = [*QUICK, "--model.split_layer=1", f"--model.init={trained}/stage2/checkpoints/last.ckpt"]
    with pytest.raises(UserError, match=r"another architecture \(model.split_layer 2, not 1\)"):
        octopus_tour.train(trained, octopus_tour.STAGES[2:], words)


def test_a_mask_head_begins_anew_and_is_kept(trained, tmp_path):
    init = trained / "stage2" / "checkpoints" / "last.ckpt"
    words = [*QUICK, "--model.mask_scale=8", "--trainer.log_every_n_steps=1", f"--model.init={init}"]
    octopus_tour.train(tmp_path, octopus_tour.STAGES[2:], words, trained)
    model = load_octopus(str(tmp_path / "stage3" / "checkpoints" / "last.ckpt"))
    assert model.masks and model.mask_size == (32, 32)
    fresh = OctopusModule(**SMALL, stage=3, num_queries=8, decoder_width=96, mask_scale=8)
    fresh.hparams.update(decoder_layers=4, heads=4)
    fresh.configure_model()
    own, new = (one.recognizer.masks.state_dict() for one in (model, fresh.model))
    assert own.keys() == new.keys() and not any(torch.equal(own[name], new[name]) for name in own if "weight" in name)
    report = next((tmp_path / "stage3").glob("version_*/report.md")).read_text()
    assert "train/mask_loss" in report and "train/dice_loss" in report and "val/mask_mean_iou" in report
    ends = str(tmp_path / "stage3" / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"of another architecture or version \(recognizer.masks"):
        octopus_tour.train(tmp_path, octopus_tour.STAGES[2:], [*QUICK, f"--model.init={ends}"], trained)


def test_masks_of_data_that_have_none_are_refused(world):
    coco = world / "flickr30k_entities"
    source = Flickr30kEntities(str(coco), str(world / "refcoco" / "images"))
    module = OctopusModule(**SMALL, stage=2, num_queries=4, decoder_width=16, mask_scale=8)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(UserError, match=r"no example of data\.train has a mask"):
        trainer.fit(module, OctopusData([source], batch_size=4, workers=0))


class Seen(pl.Callback):
    """Notes the examples of each step."""

    def __init__(self):
        self.keys = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.keys.append(batch.keys)


@pytest.mark.filterwarnings("ignore", "error:You're resuming from a checkpoint")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_goes_on_sees_what_it_would_have_seen(world, tmp_path, workers):
    def fit(out, steps, resume=None, batch_size=4, epochs=None):
        coco = world / "refcoco"
        source = RefCOCO(str(coco / "refs(unc).p"), str(coco / "instances.json"), str(coco / "images"), limit=22)
        saver = SafeCheckpoint(out, save_last=True, save_top_k=0, every_n_train_steps=1, enable_version_counter=False)
        seen = Seen()
        trainer = pl.Trainer(max_steps=steps, max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[saver, seen],
                             enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        module = OctopusModule(
            stage=2, lm="toy", vision="toy", num_queries=4, decoder_width=16, decoder_layers=1, heads=2, dtype="float32"
        )
        trainer.fit(
            module,
            OctopusData(
                [source],
                batch_size=batch_size,
                features=None if workers else str(tmp_path / "patches"),
                workers=workers,
            ),
            ckpt_path=resume,
        )
        return seen.keys

    whole = fit(tmp_path / "whole", 12)  # two epochs of five steps, and two steps more
    assert len({key for keys in whole[:5] for key in keys}) == 20 and whole[:5] != whole[5:10]
    for stop in (3, 5, 7):
        out = tmp_path / str(stop)
        begun = fit(out, stop)
        stopped = shutil.copy(out / "last.ckpt", tmp_path / f"{stop}.ckpt")
        assert begun + fit(tmp_path / f"steps{stop}", 12, str(stopped)) == whole
        # a run of epochs, whose loaders Lightning makes before it knows where the run goes on
        assert fit(tmp_path / f"epochs{stop}", -1, str(stopped), epochs=2) == whole[stop:10]
    for limit in ({"steps": 15}, {"steps": -1, "epochs": 3}):
        with pytest.raises(UserError, match=r"middle of an epoch with data.batch_size 4 \(now 2\): set that back"):
            fit(tmp_path / "other", resume=str(tmp_path / "7.ckpt"), batch_size=2, **limit)


def test_a_run_does_not_go_on_with_another_stage(trained):
    first = trained / "stage1" / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"resume from: of stage 1, not 2; begin from it by --model.init"):
        octopus_tour.train(trained, octopus_tour.STAGES[1:2], [*QUICK, f"--ckpt_path={first}"])


def test_what_earlier_stages_trained_is_kept_by_a_run_that_goes_on(trained, tmp_path):
    begun = trained / "stage2" / "checkpoints" / "last.ckpt"
    words = [*QUICK, "--trainer.max_steps=9", "--model.init=null", f"--ckpt_path={begun}"]
    words += [f"--trainer.callbacks.init_args.dirpath={tmp_path}"]
    octopus_tour.train(trained, octopus_tour.STAGES[1:2], words)
    before, after = (torch.load(path, weights_only=True) for path in (begun, tmp_path / "last.ckpt"))
    assert after["global_step"] > before["global_step"] and after["state_dict"].keys() == before["state_dict"].keys()
    name = "model.visual_prefix.weight"
    assert torch.equal(after["state_dict"][name], before["state_dict"][name])


def test_a_run_without_an_end_is_refused(world, tmp_path):
    coco = world / "refcoco"
    source = RefCOCO(str(coco / "refs(unc).p"), str(coco / "instances.json"), str(coco / "images"), limit=8)
    module = OctopusModule(
        stage=2, lm="toy", vision="toy", num_queries=4, decoder_width=16, decoder_layers=1, heads=2, dtype="float32"
    )
    trainer = pl.Trainer(max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
                         enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    with pytest.raises(UserError, match=r"give trainer.max_steps or max_epochs"):
        trainer.fit(module, OctopusData([source], batch_size=4, features=str(tmp_path / "patches")))


def test_a_run_does_not_go_on_with_the_decoder_at_another_layer(trained):
    last = trained / "stage2" / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"resume from: of another architecture \(model.split_layer 2, not 1\)"):
        octopus_tour.train(trained, octopus_tour.STAGES[1:2], [*QUICK, "--model.split_layer=1", f"--ckpt_path={last}"])


def test_what_belongs_to_another_model_is_refused(trained, capsys, tmp_path):
    with pytest.raises(UserError, match="another architecture"):
        octopus_tour.train(
            trained,
            (octopus_tour.STAGES[1],),
            [*QUICK, "--model.decoder_width=32", f"--model.init={trained}/stage2/checkpoints/last.ckpt"],
        )
    words = ["fit", "--config=octopus_toy2.yaml", "--model.num_queries=0"]
    assert main(words) == 2 and "choose stage 1 or 3" in capsys.readouterr().err


@pytest.mark.parametrize("lacks", ["recognizer.score.weight", "recognizer.leave.bias", "queries"])
def test_what_an_earlier_version_wrote_is_refused(trained, tmp_path, lacks):
    stored = torch.load(trained / "stage2" / "checkpoints" / "last.ckpt", weights_only=True)
    whole = stored["state_dict"]
    less = {name: value for name, value in whole.items() if name != f"model.{lacks}"}
    torch.save(stored | {"state_dict": less}, tmp_path / "less.ckpt")
    torch.save(stored | {"state_dict": whole | {"model.point": whole["model.queries"]}}, tmp_path / "more.ckpt")
    for name, wrong in (("less", lacks), ("more", "point")):
        path = tmp_path / f"{name}.ckpt"
        with pytest.raises(UserError, match=rf"{path}: of another architecture or version \({wrong}\)"):
            load_octopus(str(path))
        with pytest.raises(UserError, match=rf"resume from: of another architecture or version \({wrong}\)"):
            octopus_tour.train(trained, octopus_tour.STAGES[1:2], [*QUICK, f"--ckpt_path={path}"])


def test_adapters_are_all_that_is_trained_of_the_language_model(trained):
    octopus_tour.train(
        trained,
        (octopus_tour.STAGES[2],),
        [*QUICK, "--model.lora_rank=2", f"--trainer.callbacks.init_args.dirpath={trained}/lora"],
    )
    kept = torch.load(trained / "lora" / "last.ckpt", weights_only=True)["state_dict"]
    of_lm = [name for name in kept if name.startswith("model.lm.")]
    assert of_lm and all("lora_" in name for name in of_lm)
    half = build("llama")
    half.lm.hf.bfloat16()
    add_lora(half.lm, 2)
    assert {p.dtype for name, p in half.lm.hf.named_parameters() if "lora_" in name} == {torch.float32}
    half.lm(torch.randn(1, 3, 32).bfloat16(), torch.ones(1, 3, dtype=torch.bool)).sum().backward()
    assert len(ground(load_octopus(str(trained / "lora" / "last.ckpt")), [(torch.ones(16, 384), "star")], 3)) == 1


def test_the_full_size_stages_have_the_papers_values():
    models = [config["model"]["init_args"] for config in STAGES]
    assert [m["stage"] for m in models] == [1, 2, 3] and [m["lr"] for m in models] == [1e-4, 1e-4, 2e-5]
    assert {(m["num_queries"], m["split_layer"], m["lm"], m["vision"]) for m in models} == {
        (64, 16, "lmsys/vicuna-7b-v1.5", "ViT-L-14-336")
    }
    loggers = [config["trainer"]["logger"]["init_args"] for config in STAGES]
    saved = [f"{logger['save_dir']}/{logger['name']}" for logger in loggers]
    assert [m.get("init") for m in models] == [None, *saved[:2]]
    sequential = yaml.safe_load(Path(find_config("octopus_sequential.yaml")).read_text())["model"]["init_args"]
    assert sequential["num_queries"] == 0 and "stage1" in sequential["init"]


def test_checkpoints_with_former_names_are_read(trained, tmp_path):
    path = trained / "stage2" / "checkpoints" / "last.ckpt"
    stored = torch.load(path, weights_only=True)
    settings = {**stored["hyper_parameters"]}
    former = {old: settings.pop(new) for old, new in RENAMED.items()}
    state = {name.replace("index_tokens.", "index."): value for name, value in stored["state_dict"].items()}
    assert state.keys() != stored["state_dict"].keys()
    written = tmp_path / "former.ckpt"
    torch.save(stored | {"state_dict": state, "hyper_parameters": settings | former}, written)
    assert load_octopus(str(written)).fingerprint() == load_octopus(str(path)).fingerprint()
    words = [*QUICK, "--trainer.max_steps=4", f"--ckpt_path={written}"]
    octopus_tour.train(trained, octopus_tour.STAGES[1:2], [*words, f"--trainer.callbacks.init_args.dirpath={tmp_path}"])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_images_that_cannot_be_decoded_are_counted_and_too_many_refused(folder, tmp_path, caplog):
    """By image, once each, and as soon as more than max_lost of all there are cannot be; from a worker in one line."""
    whole = [str(path) for path in sorted(folder.glob("*.png"))]
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"broken")
    listed = [Example(f"good{i}", whole[i % len(whole)], "star", ("yes",), ()) for i in range(30)]
    listed += [Example(f"bad{i}", str(tmp_path / f"{i % 3}.jpg"), "star", ("yes",), ()) for i in range(6)]
    listed = [[[example]] for example in listed]
    transform = load_patches("toy").transform
    some = GroundingDataset(listed, transform, None, 0.5, replace=True)
    for _ in range(3):
        assert all(some[i][0][0][0].key.startswith("good") for i in range(len(listed)))
    assert (some.broken.good, some.broken.bad) == (len(whole), 3) and caplog.text.count("skipped") == 3
    for workers in (0, 2):
        loader = WorkerLoader(
            GroundingDataset(listed, transform, None, 0.3, replace=True), 4, num_workers=workers, collate_fn=list
        )
        with pytest.raises(
            UserError,
            match=r"^3 of 9 images cannot be had, more than 30%: .*0\.jpg \(broken\).*data\.max_lost in training\)$",
        ):
            list(loader)


def test_a_device_with_less_than_a_batch_is_told():
    data = OctopusData(batch_size=4)
    data.trainer = SimpleNamespace(world_size=8)
    with pytest.raises(UserError, match=r"20 rows .* fewer than data.batch_size 4 on each of 8 devices"):
        data._sampler(SimpleNamespace(rows=[None] * 20), 4)
