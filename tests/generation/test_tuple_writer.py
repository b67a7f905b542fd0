"""Tuples written by a language model: what is kept, batches of fixed seeds, and a run that is taken up."""

import json

import pytest
import torch

from fromage.apps import tuples
from fromage.apps.tuples import LINES, REPORT, WRITTEN, as_record, of_record, write_tuples
from fromage.data.tuple_packing import tuple_lines
from fromage.errors import BrokenSample, UserError
from fromage.generation.tuple_writer import EXAMPLES, LineEnd, Sampling, TupleWriter, Written, prompt_of, usable
from fromage.models.language_model import load_lm

CAPTION = "a brown dog runs on a beach"
CASES = {
    ("with a ball", "a brown dog runs on a beach with a ball"): None,
    ("but black.", "a black dog runs on a beach"): None,
    ("Caption: two", "a dog with two balls"): "not in the form",
    ("two balls", "a dog New caption: two balls"): "not in the form",
    ("", "a dog at night"): "empty condition",
    ("at night", "."): "empty target caption",
    (f"at {'very ' * 30} night", "a dog at night"): "condition of more than 20 words",
    ("at night", f"a dog at night {'x ' * 60}"): "target caption of more than 40 words",
    ("the same", f"{CAPTION.upper()}."): "nothing is new",
    ("the dogs", "the dogs of a beach"): "nothing is new",
    ("at night", "a red car"): "nothing of the caption is left",
    ("at night", "a brown dog swims"): "does not say what is new",
    ("a brown dog with a ball", "a dog and a ball"): "says all of the target",
}


@pytest.mark.parametrize("written", CASES)
def test_what_is_kept(written):
    if (cause := CASES[written]) is None:
        assert usable(CAPTION, Written(*written)) == written
    else:
        with pytest.raises(BrokenSample, match=cause):
            usable(CAPTION, Written(*written))


def test_the_examples_would_be_kept_themselves():
    for caption, condition, target in EXAMPLES:
        assert usable(caption, Written(condition, target)) == (condition, target)
        assert f"Caption: {caption}\nChange: {condition}\nNew caption: {target}\n" in prompt_of("x")
    assert prompt_of(" a\ndog ").endswith("\n\nCaption: a dog\nChange:")


@pytest.fixture(scope="module")
def lm():
    return load_lm("toy", rows=(), places=())


def test_a_batch_depends_on_its_seed_and_number_and_not_on_what_was_before(lm):
    writer = TupleWriter(lm, Sampling(max_new_tokens=8, temperature=2.0))
    said = ["a red star.", "a big blue ring at the left."]
    first = writer.write(said, 0)
    assert writer.write(said, 1) != first and writer.write(said, 0) == first
    assert TupleWriter(lm, Sampling(max_new_tokens=8, temperature=2.0, seed=1)).write(said, 0) != first
    greedy = TupleWriter(lm, Sampling(max_new_tokens=8, temperature=0))
    both, alone = greedy.write(said, 0), [greedy.write([text], 5)[0] for text in said]
    assert both == alone  # padding changes nothing


def test_a_row_ends_with_its_line(lm):
    stop = LineEnd(torch.tensor([False, True, False, True]), start=2)
    rows = torch.tensor([[1, 1, 0, 2, 0], [1, 0, 1, 0, 1], [0, 0, 2, 2, 99]])  # (B, T)
    assert stop(rows, None).tolist() == [False, True, True]  # an id beyond the vocabulary counts as the last one
    breaks = TupleWriter(lm, Sampling()).breaks
    assert breaks[lm.tokenizer.encode("a\nb")].sum() == 1 and breaks[lm.tokenizer.encode("a b")].sum() == 0


def test_the_target_caption_is_written_behind_the_condition(lm, monkeypatch):
    writer, seen = TupleWriter(lm, Sampling()), []
    monkeypatch.setattr(writer, "_lines", lambda prompts: seen.append(prompts) or [f"line {len(seen)}"] * len(prompts))
    assert writer.write(["a dog", "a cat"], 0) == [("line 1", "line 2")] * 2
    assert seen[1] == [f"{prompt_of(said)} line 1\nNew caption:" for said in ("a dog", "a cat")]


class Writer:
    """In place of a model: writes the night into each caption, but not into the third; killed at the fourth batch."""

    killed = True

    def __init__(self, lm, sampling):
        self.sampling = sampling

    def write(self, captions, number):
        if number == 3 and Writer.killed:
            raise KeyboardInterrupt
        return [Written("at night", text + " at night" * (text != "image 2")) for text in captions]


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(tuples, "load_lm", lambda name, *args, **named: loaded.append(name) or load_lm("toy", **named))
    monkeypatch.setattr(tuples, "TupleWriter", Writer)
    captions, sampling = tmp_path / "c.json", Sampling(batch_size=2)
    captions.write_text(json.dumps({f"{i}.jpg": f"image {i}" for i in range(9)}))
    with pytest.raises(KeyboardInterrupt):
        write_tuples(captions, tmp_path / "a", "some", sampling=sampling)
    with pytest.raises(UserError, match=r"another run \(seed 0 there, 1 here"):
        write_tuples(captions, tmp_path / "a", "some", sampling=Sampling(batch_size=2, seed=1))
    Writer.killed = False
    report = write_tuples(captions, tmp_path / "a", "some", sampling=sampling)
    write_tuples(captions, tmp_path / "b", "some", sampling=sampling)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1] and files[0].keys() == {WRITTEN, LINES, REPORT}
    assert report["kept"] == 8 and report["left_out"] == {"nothing is new in the target caption": 1}
    entries = [json.loads(line) for line in (tmp_path / "a" / LINES).read_text().splitlines()]
    assert entries[2] == {
        "image": str(tmp_path / "3.jpg"),
        "caption": "image 3",
        "condition": "at night",
        "target_caption": "image 3 at night",
    }
    assert len(list(tuple_lines(tmp_path / "a" / LINES, tmp_path, None))) == 8


def test_a_run_that_failed_or_had_other_captions_is_told_apart(tmp_path, monkeypatch):
    captions, out = tmp_path / "c.json", tmp_path / "out"
    captions.write_text(json.dumps({f"{i}.jpg": f"image {i}" for i in range(5)}))
    with pytest.raises(UserError, match="no tokenizer at /no/such/model"):
        write_tuples(captions, out, "/no/such/model")
    assert not (out / f"{WRITTEN}.part").exists(), "a name that was wrong does not stand in the way of the right one"
    monkeypatch.setattr(tuples, "load_lm", lambda name, *args, **named: load_lm("toy", **named))
    monkeypatch.setattr(tuples, "TupleWriter", Writer)
    monkeypatch.setattr(Writer, "killed", True)
    with pytest.raises(KeyboardInterrupt):
        write_tuples(captions, out, "some", sampling=Sampling(batch_size=1))
    captions.write_text(captions.read_text().replace("image 1", "another 1"))
    with pytest.raises(UserError, match=r"another run \(said '\w+' there, '\w+' here"):
        write_tuples(captions, out, "some", sampling=Sampling(batch_size=1))


def test_numbers_out_of_range_and_no_captions(tmp_path):
    with pytest.raises(UserError, match="temperature"):
        Sampling(temperature=-1)
    with pytest.raises(UserError, match="batch_size"):
        Sampling(batch_size=0)
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(UserError, match="holds no caption"):
        write_tuples(tmp_path / "c.json", tmp_path / "o", "toy")


def test_a_caption_beyond_the_positions_is_left_out_and_the_others_are_written(lm):
    longest = lm.max_length or 0
    assert longest, "the toy language model has learned positions"
    written = TupleWriter(lm, Sampling(max_new_tokens=3)).write(["word " * 2 * longest, CAPTION], 0)
    assert written[0] is None and written[1] is not None
    with pytest.raises(BrokenSample, match="too long for the language model"):
        usable("x", written[0])


def test_what_was_written_is_read_again_from_its_line():
    for written in (Written("at night", ""), None):
        assert of_record(json.loads(json.dumps(as_record(3, written)))) == written


def test_lines_of_a_former_version_are_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tuples, "load_lm", lambda name, *args, **named: load_lm("toy", **named))
    monkeypatch.setattr(tuples, "TupleWriter", Writer)
    monkeypatch.setattr(Writer, "killed", True)
    captions, sampling, out = tmp_path / "c.json", Sampling(batch_size=1), tmp_path / "out"
    captions.write_text(json.dumps({f"{i}.jpg": f"image {i}" for i in range(5)}))
    with pytest.raises(KeyboardInterrupt):
        write_tuples(captions, out, "some", sampling=sampling)
    part = out / f"{WRITTEN}.part"
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    assert len(lines) == 4 and lines[1].pop("target") == "image 0 at night"
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(Writer, "killed", False)
    assert write_tuples(captions, out, "some", sampling=sampling)["kept"] == 4
    written = [json.loads(line) for line in (out / WRITTEN).read_text().splitlines()]
    assert written[0] == {"question_id": 0, "text": "at night", "target": "image 0 at night"} and len(written) == 5
