import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_loader.py"
WAYS = {"ours", "ours, exact", "plain loader", "Pillow alone"}


def test_the_bench_runs_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    (folder := tmp_path / "images").mkdir()
    for number in range(6):
        Image.effect_noise((320, 240), 90).convert("RGB").save(folder / f"{number}.jpg")
    out = tmp_path / "bench.json"
    words = [str(folder), "--most", "4", "--rounds", "1", "--size", "64", "--shorter", "80", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *words])
    runpy.run_path(str(TOOL), run_name="__main__")
    report = json.loads(out.read_text())
    rates = report["samples_per_second_and_core"]
    assert rates.keys() == WAYS and min(rates.values()) > 0 and report["photographs"] == 4
    assert report["speedup"] == pytest.approx(rates["ours"] / rates["plain loader"])
    assert report["cores_per_card"] == pytest.approx(900 / rates["ours"])
    said = capsys.readouterr().out
    assert "plain loader" in said and "cores that feed a card" in said


def test_a_folder_without_images_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert "no folder of images" in capsys.readouterr().err
