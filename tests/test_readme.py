"""The README stays an entry: short, with what it promises."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert 300 < len(README.split()) <= 900


def test_make_has_the_targets_it_names():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "docs"} <= set(re.findall(r"make ([a-z]+)", README)) <= targets


def test_it_has_one_example_of_eight_lines_and_its_output():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert example.count("\n") <= 8 and "```text\n" in README


def test_versions_agree():
    (version,) = re.findall(r"^version = (\S+)", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
