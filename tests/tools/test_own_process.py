"""Measurements in processes of their own, and the sums of the two tools that take them."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from fromage.allocator import OPTION

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_allocator
import bench_photos
import own_process

TOOLS = Path(own_process.__file__).parent


def test_what_work_uses():
    def work():
        began = time.process_time()
        held = bytearray(1 << 26)
        held[::4096] = b"x" * len(held[::4096])
        while time.process_time() < began + 0.2:
            sum(range(1000))

    found = own_process.used(work)
    assert 0.19 < found["seconds"] < 2 and 0 <= found["system"] <= found["seconds"] and found["resident"] > 1 << 26


def test_a_process_gets_its_words_and_its_allocator(tmp_path):
    file = tmp_path / "it.py"
    file.write_text(
        f"import os, sys; sys.path.insert(0, {str(TOOLS)!r})\nfrom own_process import tell\nprint('a progress bar')\n"
        f"tell({{'words': sys.argv[1:], 'system': os.environ['{OPTION}'] == 'system'}})\n"
    )
    for plain in (True, False):
        assert own_process.measured(str(file), "task", "3", plain=plain) == {
            "words": ["--measure", "task", "3"],
            "system": plain,
        }
    file.write_text("import sys; sys.exit(3)")
    with pytest.raises(subprocess.CalledProcessError):
        own_process.measured(str(file), plain=True)


def test_an_allocator_that_cannot_be_told_ends_the_measurement(monkeypatch):
    monkeypatch.setattr(own_process, "keep_freed_memory", lambda: False)
    monkeypatch.setenv(OPTION, "system")
    own_process.allocated_as_asked()
    monkeypatch.delenv(OPTION)
    with pytest.raises(SystemExit, match="left alone"):
        own_process.allocated_as_asked()


@pytest.fixture
def images(tmp_path):
    for i in range(5):
        Image.new("RGB", (40, 40), (50 * i, 0, 0)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "x.txt").touch()
    return tmp_path


def test_both_rates_are_of_the_same_photographs(images, monkeypatch):
    seen = {}
    for side, name in {"plain": "plain_features", "ours": "our_features"}.items():
        monkeypatch.setattr(bench_photos, name, lambda files, side=side: seen.setdefault(side, files).copy)
    monkeypatch.setattr(bench_photos, "allocated_as_asked", lambda: None)
    monkeypatch.setattr(bench_photos, "used", lambda work: {"resident": 7 * len(work())})
    clock = iter([10.0, 16.0, 20.0, 23.0])
    monkeypatch.setattr(bench_photos, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = [bench_photos.measure("features", [side], images, 3) for side in ("plain", "ours")]
    assert [path.name for path in seen["plain"]] == ["0.jpg", "1.jpg", "2.jpg"] and seen["plain"] == seen["ours"]
    assert found == [{"each": 2.0, "resident": 21}, {"each": 1.0, "resident": 21}], "seconds for each of three"


def test_steps_count_what_they_train_on_and_warm_up(monkeypatch):
    ran = []
    monkeypatch.setattr(bench_photos, "steps", lambda *kind: lambda *count: ran.append((*kind, *count)))
    monkeypatch.setattr(bench_photos, "allocated_as_asked", lambda: None)
    clock = iter([0.0, 6.0])
    monkeypatch.setattr(bench_photos, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = bench_photos.measure("steps", ["fast", "float32"], Path("nowhere"), 3)
    whole = "fast", "float32"
    assert ran == [whole, whole, (*whole, 1)] and found["each"] == 6 / (bench_photos.STEPS * bench_photos.BATCH)
    assert found["flop"] == 0, "of one step, which does nothing here"


def test_features_are_of_every_photograph_or_there_is_no_rate(images, monkeypatch):
    monkeypatch.setattr(bench_photos, "VISION", "toy")
    bench_photos.our_features(bench_photos.photographs(images, 9))()
    (images / "0.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(Exception, match=r"broken|4 of 5"):
        bench_photos.our_features(bench_photos.photographs(images, 9))()


def test_the_table_of_photographs_has_medians_and_their_ratios(images, monkeypatch, capsys, tmp_path):
    asked = []

    def measured(file, task, side, *words, plain):
        asked.append((task, side, words, plain))
        turn = (len(asked) - 1) // 2 % 3
        return {
            "each": {"plain": (4, 9, 2), "reference": (4, 9, 2), "ours": (3, 1, 2), "fast": (3, 1, 2)}[side][turn],
            "resident": 5e6,
            "flop": 4e9 if side == "reference" else 2e9,
        }

    monkeypatch.setattr(bench_photos, "measured", measured)
    monkeypatch.setattr("sys.argv", ["x", "--images", str(images), "--limit", "3", "--json", str(tmp_path / "f.json")])
    bench_photos.main()
    found = json.loads((tmp_path / "f.json").read_text())["found"]
    assert found["features"] == {"plain": {"each": 4, "resident": 5e6}, "ours": {"each": 2, "resident": 5e6}, "ratio": 2}
    told = capsys.readouterr().out
    assert "| features | 0.2 | 0.5 | 2.00 | 5 | 5 |" in told and "4.00 and 2.00 GFLOP an example, 2.00 times" in told
    assert found["steps float32"]["gflop"] == {"plain": 4, "ours": 2}
    assert {words[-6:] for _, _, words, _ in asked} == {("--images", str(images), "--limit", "3", "--threads", "2")}
    assert {(task, side) for task, side, _, plain in asked if plain} == {("features", "plain")}


def test_the_table_of_allocators_has_medians_and_their_ratios(monkeypatch, capsys, tmp_path):
    asked = []

    def measured(file, task, plain):
        asked.append((task, plain))
        turn = (len(asked) - 1) // 2 % 3
        return {"seconds": ((6, 1, 2) if plain else (3, 1, 1))[turn], "system": 0.5, "resident": 2e6 if plain else 3e6}

    monkeypatch.setattr(bench_allocator, "measured", measured)
    monkeypatch.setattr("sys.argv", ["x", "--only", "embed", "step", "--json", str(tmp_path / "f.json")])
    bench_allocator.main()
    found = json.loads((tmp_path / "f.json").read_text())["tasks"]
    assert [*found] == ["embed", "step"] and found["step"]["ratio"] == 2 and found["step"]["own"]["seconds"] == 2
    assert "| embed | 2.00 | 1.00 | 2.00 | 0.50 | 0.50 | 2 | 3 |" in capsys.readouterr().out
    assert asked[:6] == [("embed", True), ("embed", False)] * 3, "in turns"


def test_an_allocators_work_is_measured_behind_a_first_round(monkeypatch):
    ran = []
    monkeypatch.setitem(bench_allocator.TASKS, "step", lambda: lambda: ran.append(1))
    monkeypatch.setattr(bench_allocator, "allocated_as_asked", lambda: None)
    monkeypatch.setattr(bench_allocator, "used", lambda work: {"rounds": len(ran)} | {"after": work()})
    assert bench_allocator.measure("step") == {"rounds": 1, "after": None} and len(ran) == 2
