"""The commands of the README and of docs/scale.md are commands."""

import re
import shlex
from pathlib import Path

import pytest

from fromage.cli.main import main, parser
from fromage.training.fit import FITTING

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = README + (ROOT / "docs" / "scale.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip() for line in PAGES.splitlines() if re.match(r"    (fromage|lightning) \w", line)
] + re.findall(r"`((?:fromage|lightning) [^`]*--[^`]*)`", PAGES)


def test_there_are_some():
    assert len(COMMANDS) > 5 and "make demo" in README and "make test" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command, capsys):
    words = shlex.split(command)[1:]
    if words[0] in FITTING:
        wanted = [w for w in words if w != "--help"]
        if "--model.help" in wanted:
            wanted = words
        with pytest.raises(SystemExit) as stop:
            main([*wanted, *([] if "--model.help" in wanted else ["--print_config"])])
        assert stop.value.code == 0
    elif "--help" not in words:
        parser().parse_args(words)


def test_files_of_the_reading_order_are_there():
    section = README.split("## Reading order")[1].split("## ")[0]
    for name in re.findall(r"`([\w/]+\.(?:py|yaml)|[\w/]+/)`", section):
        assert any((ROOT / base / name).exists() for base in ("", "fromage")), name
