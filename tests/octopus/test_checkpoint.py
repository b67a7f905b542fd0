"""Octopus on disk: a folder gives the model back, with what was trained of the language model, and refuses what is odd."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tiny_octopus import save_untrained

from fromage.checkpoints.format import CARD, CONFIG, WEIGHTS, read_folder
from fromage.cli.main import main
from fromage.config import OctopusConfig, kinds
from fromage.errors import UserError
from fromage.models.fromage import Fromage
from fromage.octopus import Octopus, ground, load_octopus
from fromage.octopus.checkpoint import check_shaped

SMALL = {"num_queries": 3, "decoder_width": 16, "decoder_layers": 1, "heads": 2}


@pytest.fixture
def model():
    return Octopus.load(**SMALL)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def altered(folder, without=None, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if name != without}))
    return folder


def same(one, other):
    return all(torch.equal(p, other.state_dict()[name]) for name, p in one.state_dict().items())


def stage3(path, trained, **hyperparameters):
    """A checkpoint of stage 3 in which the parameters that `trained` names were moved; returns the model too."""
    model = Octopus.load(**SMALL, lora_rank=hyperparameters.get("lora_rank", 0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if trained(name):
                p.add_(torch.randn(p.shape) * 0.02)
    kept = {name for name, _ in model.named_parameters() if trained(name)} | model.trained().keys()
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters() if name in kept}
    torch.save({"state_dict": state, "hyper_parameters": {**vars(model.config), "stage": 3, **hyperparameters}}, path)
    return model


def test_a_float32_folder_gives_the_model_back_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path / "saved", dtype="float32")
    loaded = Octopus.from_pretrained(tmp_path / "saved")
    assert same(model, loaded) and loaded.config == model.config and not loaded.training
    assert loaded.fingerprint() == model.fingerprint() == read_folder(tmp_path / "saved").fingerprint
    image = [(torch.ones(16, 384), "where is the star?")]
    assert ground(loaded, image, 4) == ground(model.eval(), image, 4)


def test_a_bfloat16_folder_rounds_once_and_holds_no_tower(model, folder, tmp_path):
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, CARD}
    assert read_folder(folder).tensors.keys() == model.trained().keys()
    loaded = load_octopus(str(folder))
    for name, p in model.trained().items():
        assert torch.equal(loaded.trained()[name], p.bfloat16().float()), name
    loaded.save_pretrained(tmp_path / "again")
    assert all((tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes() for name in (CONFIG, WEIGHTS, CARD))


def test_every_setting_is_on_record(folder):
    config = json.loads((folder / CONFIG).read_text())
    assert config["format"] == "octopus" and kinds(OctopusConfig).keys() - config.keys() == {"random_weights"}
    assert config["num_queries"] == 3 and config["relay"] is True and config["lora_rank"] == 0


def test_parameters_trained_around_other_towers_are_told_of(model):
    told = r"a.ckpt: .*other towers \(model.lm was vicuna and is toy; model.vision_weights was openai and is None"
    with pytest.warns(UserWarning, match=told):
        check_shaped(model, {**vars(model.config)} | {"lm": "vicuna", "vision_weights": "openai"}, {}, "a.ckpt")


def test_the_sequential_counterpart_comes_back_too(tmp_path):
    model = Octopus.load(num_queries=0)
    model.save_pretrained(tmp_path, dtype="float32")
    assert same(model, Octopus.from_pretrained(tmp_path))


@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # what an earlier test left to the collector is not meant
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rank", [0, 2])
def test_what_stage_3_trained_of_the_language_model_is_stored(rank, dtype, tmp_path, capsys):
    trained = (lambda name: "lora_" in name) if rank else (lambda name: name.startswith("lm."))
    model = stage3(tmp_path / "last.ckpt", trained, lora_rank=rank)
    assert main(["export", "--ckpt", f"{tmp_path}/last.ckpt", "--dtype", dtype, "--out", f"{tmp_path}/out"]) == 0
    of_lm = {name for name in read_folder(tmp_path / "out").tensors if name.startswith("lm.")}
    assert of_lm == {name for name, _ in model.named_parameters() if trained(name)} != set()
    assert "of the language model, which was trained too" in capsys.readouterr().out
    loaded = Octopus.from_pretrained(tmp_path / "out")
    kept = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    for name, p in model.named_parameters():
        rounded = p.to(kept).float() if trained(name) or name in model.trained() else p
        assert torch.equal(loaded.get_parameter(name), rounded), name
    loaded.save_pretrained(tmp_path / "again")
    assert read_folder(tmp_path / "again").tensors.keys() == read_folder(tmp_path / "out").tensors.keys()


def test_adapters_of_an_earlier_stage_are_none(tmp_path):
    stage3(tmp_path / "last.ckpt", lambda name: False)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    stored["hyper_parameters"] |= {"stage": 2, "lora_rank": 4}
    torch.save(stored, tmp_path / "last.ckpt")
    assert load_octopus(str(tmp_path / "last.ckpt")).config.lora_rank == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": "other"}, "another format"), ({"version": 2}, "another format"), ({"format": []}, "another format"),
        ({"without": "lm"}, "no 'lm'"), ({"num_queries": "3"}, "num_queries cannot be '3'"),
        ({"num_queries": True}, "num_queries cannot be True"), ({"split_layer": 1.5}, "split_layer cannot be 1.5"),
        ({"quantize": "int4"}, "quantize int4: must be int8 or nf4"), ({"depths": True}, "setting 'depths', which this"),
        ({"mask_scale": 4}, r"of another architecture or version \(recognizer.masks"), ({"mask_scale": 3}, "choose 2, 4, 8"),
        ({"mask_scale": True}, "mask_scale cannot be True"),
        ({"num_queries": 4}, "of another architecture"), ({"added_tokens": {"<d0>": 1}}, "made for {'<d0>': 1}"),
    ],
)  # fmt: skip
def test_an_altered_configuration_is_named(changes, named, folder):
    with pytest.raises(UserError, match=named):
        Octopus.from_pretrained(altered(folder, **changes))


def test_parameters_that_are_missing_or_no_numbers_are_named(model, tmp_path):
    for name, change, said in (
        ("queries", None, "queries"),
        ("visual_prefix.bias", None, "lacks visual_prefix.bias"),
        ("queries", torch.full((3, 192), torch.nan), "no finite numbers"),
    ):
        there = dict(model.trained()) | {name: change}
        model.saved_parameters = lambda there=there: {name: p for name, p in there.items() if p is not None}
        model.save_pretrained(tmp_path / "torn")
        with pytest.raises(UserError, match=said):
            Octopus.from_pretrained(tmp_path / "torn")


def test_a_model_of_another_kind_is_refused(folder, tmp_path, capsys):
    Fromage.load(k=1, q=8).save_pretrained(tmp_path / "fromage")
    checkpoint = save_untrained(tmp_path / "last.ckpt")
    for path in (folder, checkpoint):
        with pytest.raises(UserError, match="is of Octopus, and not of FROMAGe"):
            Fromage.from_pretrained(path)
    with pytest.raises(UserError, match="is of FROMAGe, and not of Octopus"):
        Octopus.from_pretrained(tmp_path / "fromage")
    assert main(["export", "--ckpt", str(folder), "--format", "authors", "--out", str(tmp_path / "theirs")]) == 2
    assert "is of Octopus, and the authors' files are of FROMAGe" in capsys.readouterr().err


def test_a_model_without_names_cannot_be_saved(tmp_path):
    with pytest.raises(UserError, match=r"build it by Octopus\.load"):
        Octopus.load(**SMALL, random_weights=True).save_pretrained(tmp_path)


def test_push_to_hub_uploads_the_folder(model, monkeypatch):
    seen = []

    def upload_folder(api, *, repo_id, folder_path, **options):
        seen.append((repo_id, {path.name for path in Path(folder_path).iterdir()}, load_octopus(str(folder_path))))
        return "the commit"

    repository = huggingface_hub.RepoUrl("https://huggingface.co/someone/octopus-toy")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda api, repo_id, **options: repository)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert model.push_to_hub("someone/octopus-toy") == "the commit"
    ((name, files, loaded),) = seen
    assert (name, files) == ("someone/octopus-toy", {CONFIG, WEIGHTS, CARD})
    assert torch.equal(loaded.queries, model.queries.bfloat16().float())


def test_masks_are_stored_and_the_option_with_them(tmp_path):
    torch.manual_seed(1)
    model = Octopus.load(**SMALL, mask_scale=4)
    model.save_pretrained(tmp_path / "saved", dtype="float32")
    loaded = Octopus.from_pretrained(tmp_path / "saved")
    assert loaded.masks and loaded.config.mask_scale == 4 and same(model, loaded)
    assert loaded.fingerprint() == model.fingerprint() != Octopus.load(**SMALL).fingerprint()
    config = json.loads((tmp_path / "saved" / CONFIG).read_text())
    del config["mask_scale"]  # as of a folder that was written before there were masks
    (tmp_path / "saved" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"of another architecture or version \(recognizer.masks"):
        Octopus.from_pretrained(tmp_path / "saved")


def test_a_folder_of_before_there_were_masks_has_none(folder, model):
    loaded = Octopus.from_pretrained(altered(folder, without="mask_scale"))
    assert not loaded.masks and loaded.config.mask_scale == 0 and loaded.mask_size is None
