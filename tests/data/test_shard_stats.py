import io
import json

import pytest
from PIL import Image
from test_datamodule import image, tar
from test_shards import pairs

from fromage.cli.main import main
from fromage.data.sample_images import to_npy
from fromage.data.shard_stats import check_shards, quantiles
from fromage.data.shard_writer import write_shards
from fromage.images.open import open_image

GOOD = {"jpg": image(), "txt": b"three short words"}


RED, WIDE = image((255, 0, 0)), io.BytesIO()
Image.new("RGB", (60, 10)).save(WIDE, "PNG")


@pytest.fixture
def mixed(tmp_path):
    """Two shards with one sample of every kind of trouble, and one cut off."""
    tar(
        tmp_path / "a.tar",
        ("twice", {"jpg": RED, "txt": b"one"}),
        ("copy", {"jpg": RED, "txt": b"two"}),
        ("junk", {"jpg": b"junk", "txt": b"x"}),
        ("alone", {"jpg": image()}),
        ("empty", {"jpg": image(), "txt": b" \n"}),
        ("latin", {"jpg": image(), "txt": "é".encode("latin-1")}),
        ("blind", {"txt": b"x"}),
    )
    tar(tmp_path / "b.tar", ("twice", GOOD), ("same", GOOD), ("wide", {"jpg": WIDE.getvalue(), "txt": "😀 word".encode()}))
    write_shards(pairs(3), tmp_path / "c")
    whole = (tmp_path / "c" / "00000.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(whole[:5000])
    (tmp_path / "sizes.json").write_text(json.dumps({"c.tar": 3}))
    return tmp_path


def test_every_kind_of_trouble_is_counted_and_named(mixed):
    found = check_shards(str(mixed)).figures()
    causes = {cause: entry["count"] for cause, entry in found["causes"].items()}
    kept = 3 - causes.pop("fewer than sizes.json says")
    assert causes == {
        "undecodable image": 1,
        "no caption": 1,
        "empty caption": 1,
        "caption is not UTF-8": 1,
        "no image": 1,
        "truncated or damaged": 1,
    }
    assert found["shards"] == 3
    assert found["usable"] == 5 + kept
    assert found["samples"] == found["usable"] + found["broken"]
    assert found["causes"]["undecodable image"]["first"] == [f"{mixed}/a.tar#junk (not JPEG, PNG, WebP, BMP or GIF)"]
    assert found["causes"]["truncated or damaged"]["first"][0].startswith(f"{mixed}/c.tar (after")
    assert found["smallest_image"]["size"] == [4, 4]
    assert found["largest_image"] == {"name": f"{mixed}/b.tar#wide", "size": [60, 10]}
    assert found["caption_words"]["min"] == 1


def test_what_comes_twice_is_found_by_key_image_and_pair(mixed):
    tar(mixed / "a.tar", *[(k, {"jpg": RED, "txt": t}) for k, t in (("twice", b"one"), ("copy", b"two"))])
    twice = check_shards([f"{mixed}/a.tar", f"{mixed}/b.tar"]).figures()["twice"]
    a, b = f"{mixed}/a.tar", f"{mixed}/b.tar"
    assert twice["key"] == {"count": 1, "first": [f"{b}#twice = {a}#twice"]}
    assert twice["image"] == {"count": 2, "first": [f"{a}#copy = {a}#twice", f"{b}#same = {b}#twice"]}
    assert twice["image and caption"] == {"count": 1, "first": [f"{b}#same = {b}#twice"]}


def test_images_and_captions_are_counted(tmp_path):
    said = [["one"], ["one two", "three", "four five six"], ["x y", "z"]]
    about = [
        {"jpg": image((i, 0, 0)), "txt": b"x", "json": json.dumps({"captions": s}).encode()} for i, s in enumerate(said)
    ]
    tar(tmp_path / "x.tar", *[(f"k{i}", members) for i, members in enumerate(about)])
    report = check_shards(f"{tmp_path}/x.tar", shown=3)
    found = report.figures()
    assert (found["samples"], found["usable"], found["captions"]) == (3, 3, 6)
    assert (found["captions_per_image"]["min"], found["captions_per_image"]["max"]) == (1, 3)
    assert (found["caption_words"]["min"], found["caption_words"]["max"]) == (1, 3)
    assert "3 images with 6 captions\n" in report.text() and found["twice"]["image"]["count"] == 0
    assert {texts for _, _, (_, texts) in report.sheet} == {"\n".join(texts) for texts in said}


def test_copies_of_an_image_come_with_the_remedy(tmp_path):
    tar(tmp_path / "x.tar", ("a_0", {"jpg": RED, "txt": b"one"}), ("a_1", {"jpg": RED, "txt": b"two"}))
    assert "pack each image once with all its captions" in check_shards(f"{tmp_path}/x.tar").text()


def test_workers_find_the_same(mixed):
    one, two = check_shards(str(mixed), shown=3), check_shards(str(mixed), shown=3, workers=2)
    a, b = one.figures(), two.figures()
    assert [name for _, name, _ in one.sheet] == [name for _, name, _ in two.sheet]
    for figures in (a, b):
        figures.pop("twice")
        figures["causes"] = {cause: sorted(entry["first"]) for cause, entry in figures["causes"].items()}
        figures["worst_shards"] = sorted(figures["worst_shards"].items())
    assert a == b


def test_samples_are_drawn_without_favour(tmp_path):
    write_shards(pairs(200), tmp_path / "s", per_shard=50)
    drawn = [int(name[-3:]) for _, name, _ in check_shards(str(tmp_path / "s"), shown=40).sheet]
    assert len(set(drawn)) == 40
    assert 60 < sum(drawn) / 40 < 140  # the mean of all is 99.5, its standard error 9
    assert check_shards(str(tmp_path / "s"), shown=0).sheet == []


def test_stored_features_are_checked(tmp_path):
    import torch

    tar(tmp_path / "x.tar", *[(k, {"npy": to_npy(torch.full((3,), v)), "txt": b"x"}) for k, v in (("a", 1.0), ("b", 2.0))],
        ("c", {"npy": b"junk", "txt": b"x"}))  # fmt: skip
    found = check_shards(f"{tmp_path}/x.tar").figures()
    assert (found["usable"], found["broken"], found["twice"]["image and caption"]["count"]) == (2, 1, 0)
    assert found["smallest_image"] is None


@pytest.mark.parametrize(("limit", "code"), [(0.5, "accept"), (0.1, "refuse")])
def test_the_verb_prints_writes_and_says_whether_training_would_go(tmp_path, capsys, limit, code):
    tar(tmp_path / "x.tar", *[(f"k{i}", GOOD) for i in range(3)], ("bad", {"jpg": b"junk", "txt": b"x"}))
    words = ["shards", "check", f"{tmp_path}/x.tar", "--max-broken", str(limit), "--workers", "0"]
    assert main([*words, "--json", f"{tmp_path}/r.json", "--png", f"{tmp_path}/r.png"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"training would {code} these shards: 25.0% broken, max_broken allows {limit:.1%}; " \
        f"worst {tmp_path}/x.tar, 25.0%"  # fmt: skip
    assert json.loads((tmp_path / "r.json").read_text())["accepted"] is (code == "accept")
    assert Image.open(tmp_path / "r.png").height > 160


def test_captions_are_counted_in_tokens_where_a_tokenizer_is_named(tmp_path, capsys):
    from fromage.models.frozen import TOY

    tar(tmp_path / "x.tar", ("a", GOOD))
    out = tmp_path / "r.json"
    assert main(["shards", "check", f"{tmp_path}/x.tar", "--tokenizer", str(TOY / "opt"), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["caption_tokens"]["max"] > 4  # </s>, three words, [RET]


def test_bad_options_are_refused(tmp_path, capsys):
    assert main(["shards", "check", f"{tmp_path}/none.tar"]) == 2
    assert "none.tar is missing" in capsys.readouterr().err
    assert main(["shards", "check", str(tmp_path), "--max-broken", "1.5"]) == 2
    assert "max-broken: 1.5: give a number from 0 to 1" in capsys.readouterr().err


def test_names_in_the_report_can_be_opened(mixed):
    report = check_shards(str(mixed / "b.tar"))
    assert open_image(report.figures()["largest_image"]["name"]).size == (60, 10)


def test_quantiles_are_values():
    assert list(quantiles(list(range(101))).values()) == [0, 5, 25, 50, 75, 95, 100]
    assert quantiles([]) == {}
