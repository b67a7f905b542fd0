"""Decoders on the states of queries, here of an untrained Octopus on the small toy world."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_octopus import save_untrained

from fromage.octopus.module import OctopusModule

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import probe_queries


def test_every_way_in_is_trained_and_judged_once(world, tmp_path, monkeypatch, capsys):
    module = OctopusModule(stage=1, lm="toy", vision="toy", vision_weights=None, dtype="float32", num_queries=8)
    module.configure_model()
    prefix = {f"model.visual_prefix.{name}": p.detach() for name, p in module.model.visual_prefix.named_parameters()}
    torch.save({"state_dict": prefix, "hyper_parameters": dict(module.hparams)}, tmp_path / "one.ckpt")
    words = ["probe", "--octopus", str(tmp_path / "one.ckpt"), "--world", str(world), "--out", str(tmp_path / "probe")]
    words += ["--train", "40", "--val", "20", "--steps", "2", "--batch-size", "8", "--json", str(tmp_path / "f.json")]
    monkeypatch.setattr(sys, "argv", words)
    probe_queries.main()
    told = capsys.readouterr().out
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert figures.keys() == probe_queries.WAYS.keys() and all(f"| {name} |" in told for name in figures)
    assert all(0 <= found["all"]["mean"] <= 100 for found in figures.values())
    monkeypatch.setattr(probe_queries, "train", lambda *given: pytest.fail("trained twice"))
    probe_queries.main()
    whole = str(save_untrained(tmp_path / "whole.ckpt"))
    monkeypatch.setattr(sys, "argv", [*words, "--judge", whole])
    probe_queries.main()
    assert f"| {whole} | " in capsys.readouterr().out


def test_expressions_of_one_word_of_a_kind():
    texts = ["where is the red one?", "where is the arrow?", "where is the small red one?", "where is the red arrow?"]
    assert [probe_queries.kind(text) for text in texts] == ["colour", "shape", "", ""]
    assert [probe_queries.kind(text) for text in ("where is the biggest one?", "describe it")] == ["", ""]
