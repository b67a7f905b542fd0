"""Real photographs, real captions and OPT's own vocabulary through everything, killed on the way."""

import importlib.util
import json
from pathlib import Path

from PIL import Image

from fromage.retrieval.open_index import load_index

SPEC = importlib.util.spec_from_file_location("real_input", Path(__file__).resolve().parents[2] / "tools" / "real_input.py")


def test_the_whole_path_on_photographs(shared_data, tmp_path):
    tool = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(tool)
    recalls = tool.run(shared_data, tmp_path, steps=12, kills=("fit",), compare=True)
    assert set(recalls) == {f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)}
    assert json.loads((tmp_path / "shards" / "report.json").read_text())["pairs"] == 641
    assert len(load_index(tmp_path / "index")) == 128 and Image.open(tmp_path / "searches.png").width > 400
