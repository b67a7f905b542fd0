"""A folder of trained parameters on disk, without any towers: written whole, read only if sound."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fromage.checkpoints.format import CARD, CONFIG, WEIGHTS, Saved, read_folder, write_folder
from fromage.errors import UserError
from fromage.models.frozen import TOY

SETTINGS = {"lm": "facebook/opt-125m", "vision": "ViT-B-32", "vision_weights": "openai", "k": 1, "q": 8}
SETTINGS |= {"pooling": "ret", "dtype": "bfloat16", "input_prompt": "A picture of", "quantize": None}
SETTINGS |= {"r": 1, "ret_attention": "sequential", "ret_fusion": "mean", "space": "learned", "start": "after_images"}


@pytest.fixture
def saved():
    torch.manual_seed(0)
    tensors = {"image_head.weight": torch.randn(8, 768), "ret.input": torch.randn(1, 24).bfloat16()}
    return Saved("here", tensors, SETTINGS, {"<|image|>": 50265, "[RET]": 50266}, "0123456789abcdef")


@pytest.fixture
def folder(saved, tmp_path):
    write_folder(saved, tmp_path / "deep" / "saved")
    return tmp_path / "deep" / "saved"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read_back_in_its_dtypes(saved, folder):
    again = read_folder(folder)
    assert replace(again, source="here", tensors={}) == replace(saved, tensors={})
    for name, value in saved.tensors.items():
        assert again.tensors[name].dtype == value.dtype and torch.equal(again.tensors[name], value)
    assert again.dtype == "float32" and set(content(folder)) == {WEIGHTS, CONFIG, CARD}


def test_equal_parameters_give_equal_bytes(saved, folder, tmp_path):
    write_folder(saved, tmp_path / "again")
    assert content(tmp_path / "again") == content(folder)


@pytest.mark.parametrize("seed", range(16))
def test_a_flipped_bit_is_found(seed, folder):
    weights = bytearray((folder / WEIGHTS).read_bytes())
    draw = random.Random(seed)
    weights[draw.randrange(len(weights) if seed % 2 else 200)] ^= 1 << draw.randrange(8)
    (folder / WEIGHTS).write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors.*digest"):
        read_folder(folder)


def test_torn_and_missing_files_are_named(folder):
    weights = (folder / WEIGHTS).read_bytes()
    for torn in (b"", weights[:-1]):
        (folder / WEIGHTS).write_bytes(torn)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_folder(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        read_folder(folder)
    for config in ((folder / CONFIG).read_text()[:50], "[]", "\x00"):
        (folder / CONFIG).write_text(config)
        with pytest.raises(UserError, match="cannot be read as trained parameters"):
            read_folder(folder)


def test_parameters_of_another_saving_are_found(saved, folder):
    """As if saving over a folder had been killed between its two files."""
    config = (folder / CONFIG).read_bytes()
    write_folder(replace(saved, tensors={"ret.input": torch.zeros(1, 24)}), folder, overwrite=True)
    (folder / CONFIG).write_bytes(config)
    with pytest.raises(UserError, match="digest"):
        read_folder(folder)


def test_saving_that_fails_leaves_what_was_there(saved, folder, monkeypatch):
    before, write = content(folder), Path.write_bytes

    def until_full(path, data):
        write(path, data[:10])
        if CONFIG in path.name:
            raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", until_full)
    with pytest.raises(UserError, match="No space left"):
        write_folder(replace(saved, tensors={"ret.input": torch.zeros(1, 24)}), folder, overwrite=True)
    assert content(folder) == before


def test_saving_again_replaces_the_parameters_and_keeps_the_card(saved, folder):
    (folder / CARD).write_text("mine")
    write_folder(replace(saved, tensors={"ret.input": torch.zeros(1, 24)}), folder, overwrite=True)
    assert list(read_folder(folder).tensors) == ["ret.input"] and (folder / CARD).read_text() == "mine"


def test_a_folder_that_is_there_is_replaced_only_where_that_is_said(saved, folder):
    before = content(folder)
    with pytest.raises(UserError, match=r"config\.json: is there already.*--overwrite"):
        write_folder(replace(saved, tensors={"ret.input": torch.zeros(1, 24)}), folder)
    assert content(folder) == before


def test_a_folder_of_something_else_is_refused_and_left_alone(saved, tmp_path):
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(UserError, match=r"give the \.ckpt"):
        read_folder(tmp_path)
    other = tmp_path / "opt"
    shutil.copytree(TOY / "opt", other)
    before = content(other)
    with pytest.raises(UserError, match="something else than trained"):
        write_folder(saved, other)
    assert content(other) == before
    with pytest.raises(UserError, match="cannot be written"):
        write_folder(saved, other / CONFIG / "folder")


def test_an_older_folder_has_no_prompt(folder):
    config = json.loads((folder / CONFIG).read_text())
    del config["input_prompt"]
    (folder / CONFIG).write_text(json.dumps(config))
    assert read_folder(folder).settings["input_prompt"] == ""
    (folder / CONFIG).write_text(json.dumps(config | {"input_prompt": 3}))
    with pytest.raises(UserError, match="input_prompt cannot be 3"):
        read_folder(folder)
