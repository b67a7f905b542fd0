import json
from pathlib import Path

import pytest
from tiny_octopus import build, save_untrained

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_grounding

    return bench_grounding


@pytest.mark.parametrize(("n", "tokens"), [(8, 1), (0, 25)])
def test_what_is_forced_is_answered(bench, n, tokens):
    model = build("llama", n)
    for count in (1, 3):
        answer = bench.answer(model, bench.torch.randn(4, 20), count)
        assert len(answer.boxes) == count
        assert len(bench.forced(model, count)) == count * tokens + 1 and answer.words == ""
    assert answer.queries == ([0, 1, 2] if n else [])
    told = bench.answer(model, bench.torch.randn(4, 20), 2, bench.WORDS)
    assert len(told.boxes) == 2 and told.words == " ".join([bench.WORDS.strip()] * 2)
    assert not model.lm.hf.get_output_embeddings()._forward_hooks, "afterwards the model speaks for itself"


def test_untrained_pairs_are_timed(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "BOXES", (1, 3))
    out = tmp_path / "bench.json"
    assert bench.main(["--preset", "tiny", "--rounds", "1", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    speedups = {
        f"speedup_{boxes}{given}" for boxes in ("1_box", "3_boxes") for given in ("", "_from_pixels", "_in_a_sentence")
    }
    assert all(report[name] > 0 for name in speedups)
    assert not any("8_boxes" in name for name in report)
    assert (report["octopus"]["tokens_per_box"], report["sequential"]["tokens_per_box"]) == (1, 25)
    assert all(report[who]["prefill_share"]["3_boxes"] > 0 for who in ("octopus", "sequential"))
    assert report["patches"] == 49 and report["queries"] == 64 and "25" in capsys.readouterr().out


def test_trained_pairs_are_judged_too(bench, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "BOXES", (1,))
    pair = {name: str(save_untrained(tmp_path / f"{name}.ckpt", n)) for name, n in (("octopus", 8), ("sequential", 0))}
    words = [word for name, path in pair.items() for word in (f"--{name}", path)]
    words += ["--world", str(world), "--limit", "3", "--rounds", "1"]
    assert bench.main([*words, "--json", str(tmp_path / "bench.json")]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["examples"] == 3 and all(0 <= report[who]["acc_iou50"] <= 100 for who in pair)
    assert report["octopus"]["checkpoint"] != report["sequential"]["checkpoint"]
    capsys.readouterr()
    assert bench.main([*words, "--octopus", pair["sequential"]]) == 2 and "object queries" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(words[:2])
