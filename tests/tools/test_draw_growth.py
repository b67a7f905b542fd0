"""The charts of how cost grows: drawn, with every point, from what was measured."""

import json
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def test_four_charts_have_a_point_for_each_size(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    import draw_growth

    for name, sizes in {"CAPTIONS": (2, 3), "WORDS": (3, 9), "IMAGES": (1, 2), "ROWS": (90, 99), "TOKENS": 2}.items():
        monkeypatch.setattr(draw_growth, name, sizes)
    draw_growth.main(["--out", str(tmp_path), "--rounds", "1", "--threads", "1"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    sides = {"captions": 2, "rows": 2, "prompt": 2, "images": 1}
    for name, count in sides.items():
        chart = (tmp_path / f"{name}.svg").read_text()
        assert len(figures[name]) == count and f"line-{count - 1}" in chart and draw_growth.CHARTS[name][1] in chart
        assert all(len(points) == 2 for points in figures[name].values())
        assert all(value > 0 for side, points in figures[name].items() if "further" not in side for _, value in points)
    assert capsys.readouterr().out.count(" by ") >= 7


def test_a_point_is_the_median_of_rounds_without_the_first(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import draw_growth

    clock = iter([0, 100, 101, 200, 205, 300, 302])  # of the first round the beginning alone
    monkeypatch.setattr(draw_growth, "perf_counter", lambda: next(clock))
    assert draw_growth.measure({"side": {7: lambda: None}}, 3, 10) == {"side": [(7, 20)]}
