"""Whether a language model sees its first place, of the toy one."""

import sys
from pathlib import Path

import pytest

from fromage.models.language_model import load_lm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import probe_first_place


def test_each_text_has_a_figure_of_each_form(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["probe", "--lm", "toy"])
    probe_first_place.main()
    rows = [line.split("|")[2:5] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [cell.strip() for cell in rows[0]] == ["after_images", "first", "without"]
    assert len(rows) == 1 + len(probe_first_place.TEXTS) and all(float(cell) < 0 for row in rows[1:] for cell in row)


def test_a_likelihood_is_that_of_the_word_after_the_text():
    lm = load_lm("toy")
    word, other = lm.tokenizer.encode(" star"), lm.tokenizer.encode(" horse")
    start = lm.tokenizer.start()
    likely, unlikely = (probe_first_place.likelihood(lm, start, "a red", ids[0]) for ids in (word, other))
    assert likely > unlikely + 1


def test_without_a_start_token_there_is_nothing_to_choose(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["probe", "--lm", "toy"])
    monkeypatch.setattr("fromage.data.tokenizer.PromptTokenizer.start", lambda self: [])
    with pytest.raises(SystemExit):
        probe_first_place.main()
    assert "toy has no start token" in capsys.readouterr().err
