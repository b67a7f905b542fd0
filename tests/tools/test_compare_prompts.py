import re
import runpy
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_prompts.py"


def test_each_form_of_a_prompt_has_its_own_figure(toy_model, world, tmp_path, monkeypatch, capsys):
    toy_model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path / "model"), "--world", str(world), "--limit", "3"])
    runpy.run_path(str(TOOL), run_name="__main__")
    figures = dict(re.findall(r"^(.+?) +(-?[0-9.]+) nats a token$", capsys.readouterr().out, re.M))
    assert len(figures) == 6 and "[image] [</s>]" in figures
    assert len({*figures.values()}) == 6, "no two prompts are the same"
