"""Odd files in all that is read: one line that says what is wrong, or some entries left out; never Python's own words."""

import gzip
import io
import json
import os
import pickle
import re
import struct
import tarfile
import warnings
from functools import reduce
from operator import getitem
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fromage.cli.main import main
from fromage.data.image_source import find_images
from fromage.data.packing import PackReport, pack_coco, pack_jsonl, pack_tsv
from fromage.data.shard_sizes import read_sizes
from fromage.data.shard_stats import check_shards
from fromage.errors import UserError
from fromage.evals.caption_sets import read_caption_set
from fromage.evals.dialogues import read_dialogues
from fromage.evals.few_shot import single_scenes
from fromage.evals.questions import read_questions
from fromage.evals.vist import read_stories
from fromage.evals.vqa import read_vqa
from fromage.images.open import open_image
from fromage.octopus.sources import (
    CocoObjects,
    Flickr30kEntities,
    Flickr30kSpotting,
    Instructions,
    Pope,
    RefCOCO,
    VisualGenome,
)
from fromage.octopus.sources.file_source import with_masks

PYTHON = re.compile(  # what no message may hold
    r"Traceback|\b\w+Error\b|Errno|NoneType|<class|not subscriptable|unpack|codec can't|Expecting|embedded null"
    r"|object has no attribute|invalid literal|list index|invalid load key|not iterable|unhashable"
)
DEEP = "[" * 100_000


def told(read):
    """What a reader says of a file: its error, its warnings, or nothing. Anything but a UserError is a fault."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = read()
        except UserError as error:
            said = [str(error)]
        else:
            said = found.text().splitlines()[1:] if isinstance(found, PackReport) else []
    said += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    for text in said:
        assert not PYTHON.search(text) and "\n" not in text, text
    return said


@pytest.fixture(scope="module")
def places(world, tmp_path_factory):
    """Format -> (a good file of it, its reader)."""
    out, images = tmp_path_factory.mktemp("odd"), world / "coco" / "val2017"
    names = sorted(path.name for path in images.iterdir())[:40]
    (out / "pairs.tsv").write_text("".join(f"a star\t{name}\n" for name in names))
    (out / "pairs.jsonl").write_text("".join(json.dumps({"image": name, "captions": ["a star"]}) + "\n" for name in names))
    (out / "names.json").write_text(json.dumps(dict.fromkeys(names, "a star")))
    asked = [{"question_id": i, "image": name, "text": "what?"} for i, name in enumerate(names)]
    (out / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    talk = [{"from": "human", "value": "which?"}, {"from": "gpt", "value": "a star"}]
    science = [{"id": str(i), "image": name, "conversations": talk} for i, name in enumerate(names)]
    (out / "science.json").write_text(json.dumps(science))
    said = [{"question_id": i, "answer_type": "other", "answers": [{"answer": "star"}] * 10} for i in range(40)]
    (out / "vqa.json").write_text(json.dumps({"annotations": said}))
    vist, talks, refs = world / "vist", world / "visdial", world / "refcoco"
    dense = talks / "visdial_1.0_val_dense_annotations.json"
    captions = world / "coco" / "annotations" / "captions_val2017.json"

    def entities(path, kind=Flickr30kEntities):
        folder = out / f"entities{os.urandom(4).hex()}"
        folder.mkdir()
        for name in ("Sentences", "Annotations"):
            (folder / name).symlink_to(world / "flickr30k_entities" / name)
        (folder / "val.txt").symlink_to(path)
        return list(kind(str(folder), str(images), split="val"))

    for name, number in (("image_data", "image_id"), ("region_descriptions", "id"), ("objects", "image_id")):
        few = json.loads((world / "visual_genome" / f"{name}.json").read_text())
        many = [entry | {number: entry[number] + 10 * n} for n in range(10) for entry in few]
        (out / f"{name}.json").write_text(json.dumps(many))

    def regions(path, sizes=out / "image_data.json"):
        return list(VisualGenome(str(path), str(sizes), str(world / "visual_genome")))

    def segmented(path):
        source = RefCOCO(str(refs / "refs(unc).p"), str(path), str(images), split="val")
        with_masks([source])
        return list(source)

    def packed(pack):
        return lambda path: pack(path, out / os.urandom(4).hex(), images)

    return {
        "tsv": (out / "pairs.tsv", packed(pack_tsv)),
        "jsonl": (out / "pairs.jsonl", packed(pack_jsonl)),
        "coco": (captions, lambda path: pack_coco(path, images, out / os.urandom(4).hex())),
        "captions of an index": (out / "names.json", lambda path: find_images(str(images), None, path)),
        "coco captions of an index": (captions, lambda path: find_images(str(images), None, path)),
        "coco set": (captions, lambda path: read_caption_set(path, images)),
        "flickr30k": (
            world / "flickr30k" / "dataset_flickr30k.json",
            lambda path: read_caption_set(path, images, "flickr30k"),
        ),
        "scenes": (captions, single_scenes),
        "vist": (vist / "sis" / "val.story-in-sequence.json", lambda path: read_stories(path, vist / "images" / "val")),
        "visdial": (talks / "visdial_1.0_val.json", lambda path: read_dialogues(path, dense, images)),
        "ratings": (dense, lambda path: read_dialogues(talks / "visdial_1.0_val.json", path, images)),
        "instances": (
            refs / "instances.json",
            lambda path: list(RefCOCO(str(refs / "refs(unc).p"), str(path), str(images), split="val")),
        ),
        "masks": (refs / "instances.json", segmented),
        "detect": (refs / "instances.json", lambda path: list(CocoObjects(str(path), str(images)))),
        "regions": (out / "region_descriptions.json", regions),
        "objects": (out / "objects.json", regions),
        "sizes": (out / "image_data.json", lambda path: regions(out / "objects.json", path)),
        "refs": (
            refs / "refs(unc).p",
            lambda path: list(RefCOCO(str(path), str(refs / "instances.json"), str(images), split="val")),
        ),
        "llava": (world / "llava" / "instruct_val.json", lambda path: list(Instructions(str(path), str(world)))),
        "pope": (world / "attributes" / "val.json", lambda path: list(Pope(str(path), str(images)))),
        "entities": (world / "flickr30k_entities" / "val.txt", entities),
        "spotting": (world / "flickr30k_entities" / "val.txt", lambda path: entities(path, Flickr30kSpotting)),
        "questions": (out / "questions.jsonl", lambda path: read_questions(path, images)),
        "science": (out / "science.json", lambda path: read_questions(path, images)),
        "vqa": (out / "vqa.json", read_vqa),
    }


FORMATS = (
    "tsv",
    "jsonl",
    "coco",
    "captions of an index",
    "coco captions of an index",
    "coco set",
    "flickr30k",
    "scenes",
    "vist",
    "visdial",
    "ratings",
    "instances",
    "masks",
    "detect",
    "regions",
    "objects",
    "sizes",
    "refs",
    "llava",
    "pope",
    "entities",
    "spotting",
    "questions",
    "science",
    "vqa",
)
JSON = [name for name in FORMATS if name not in ("tsv", "jsonl", "refs", "pope", "entities", "spotting", "questions")]
WHOLE = {  # of a file as a whole: bytes -> bytes
    "empty": lambda data: b"",
    "white space": lambda data: b" \n\n ",
    "truncated": lambda data: data[: len(data) // 2],
    "null bytes": lambda data: bytes(500),
    "null bytes between": lambda data: data.replace(b"a", b"a\0"),
    "UTF-16 without a mark": lambda data: data.decode("latin-1").encode("utf-16-le"),
    "Latin-1": lambda data: data.replace(b"a", b"\xe9"),
    "half a mark": lambda data: b"\xff" + data,
    "an image": lambda data: b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(99),
    "a zip": lambda data: b"PK\3\4" + bytes(60),
    "gzipped": gzip.compress,
    "HTML": lambda data: b"<!DOCTYPE html><html><body>404</body></html>\n",
    "null": lambda data: b"null",
    "a number": lambda data: b"5",
    "NaN": lambda data: b"NaN",
    "a text": lambda data: b'"text"',
    "a list": lambda data: b"[]",
    "a list of a list": lambda data: b"[[]]",
    "a list of null": lambda data: b"[null]",
    "an object": lambda data: b"{}",
    "an object of nothing": lambda data: (
        b'{"images": null, "annotations": 5, "data": [], "version": "1.0", "dataset": "coco"}'
    ),
    "deep": lambda data: DEEP.encode(),
    "deep object": lambda data: b'{"a":' * 100_000,
    "a number of 5,000 digits": lambda data: b"[" + b"9" * 5000 + b"]",
    "two documents": lambda data: data + data if data[:1] in b"[{" else b"{} {}",
    "quotes": lambda data: b'"a\tb"\n\'c\'\t"d\n',
    "CR alone": lambda data: data.replace(b"\n", b"\r"),
}


FINE = ("CR alone", "truncated", "Latin-1", "null bytes between")  # in some formats
ALSO_FINE = {("pope", "two documents"), ("jsonl", "two documents"), ("captions of an index", "an object of nothing")}


@pytest.mark.parametrize("format", FORMATS)
def test_files_that_are_odd_as_a_whole(places, tmp_path, format):
    good, read = places[format]
    assert told(lambda: read(good)) == []
    data = good.read_bytes()
    for name, change in WHOLE.items():
        (path := tmp_path / f"{name}{good.suffix}").write_bytes(change(data))
        said = told(lambda path=path: read(path))
        assert said or name in FINE or change(data) == data or (format, name) in ALSO_FINE, name
    for odd in (tmp_path, tmp_path / "gone.json", Path("a\0b.json"), Path("/proc/self/mem"), tmp_path / ("long" * 100)):
        assert format in ("entities", "spotting") or told(lambda odd=odd: read(odd))


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "refs"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_texts_with_a_byte_order_mark_and_crlf_are_read(places, tmp_path, format, encoding):
    good, read = places[format]
    text = good.read_text().replace("\n", "\r\n")
    (path := tmp_path / f"a{good.suffix}").write_bytes((("\ufeff" * (encoding == "utf-16-be")) + text).encode(encoding))
    assert told(lambda: read(path)) == []


ODD = (
    None,
    True,
    5,
    -1,
    10**30,
    1e400,
    float("nan"),
    "",
    "x",
    "\ud83d",
    "a\0b",
    [],
    [None],
    {},
    {"a": None},
    "../" * 500,
    "x" * 500,
)


def paths_of(value, at=()):
    """The places of a JSON value, of each list its first two entries."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths_of(item, (*at, key))


def changed(value, at, new):
    """A value of JSON with another one at a place; new ... removes it."""
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(at) == 1 and new is ...:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


def shortened(value):
    """A file of fewer entries, so that each change is quick to try."""
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    return [shortened(item) for item in value[:100]] if isinstance(value, list) else value


@pytest.mark.parametrize("format", [*JSON, "refs"])
def test_fields_of_another_type(places, tmp_path, format):
    """Every field of the first entries in turn is of another type, or missing."""
    good, read = places[format]
    as_pickle = format == "refs"
    whole = pickle.loads(good.read_bytes()) if as_pickle else json.loads(good.read_text())
    path, tried = tmp_path / f"a{good.suffix}", 0
    for at in dict.fromkeys(
        paths_of(whole if format in ("visdial", "ratings", "refs", "instances", "masks") else shortened(whole))
    ):
        if len(at) > 5:
            continue
        new = ODD[tried % len(ODD)]
        for value in (new, ...) if at else (new,):
            content = changed(whole, at, value)
            path.write_bytes(pickle.dumps(content) if as_pickle else json.dumps(content).encode())
            told(lambda: read(path))
        tried += 1
    assert tried > 5


@pytest.mark.parametrize(
    ("format", "at"),
    [
        ("coco", ("images",)),
        ("coco set", ("annotations",)),
        ("flickr30k", ("images",)),
        ("vist", ("annotations",)),
        ("instances", ("annotations",)),
        ("masks", ("annotations",)),
        ("detect", ("annotations",)),
        ("regions", (0, "regions")),
        ("objects", (0, "objects")),
        ("sizes", ()),
    ],
)
def test_the_very_first_entry_may_be_odd(places, tmp_path, format, at):
    good, read = places[format]
    content = json.loads(good.read_text())
    for odd in (None, 5, {}, []):
        (path := tmp_path / "a.json").write_text(json.dumps(changed(content, at, [odd, *reduce(getitem, at, content)])))
        assert re.search("left out|skipped", told(lambda path=path: read(path))[0])


@pytest.mark.parametrize("value", ODD, ids=ascii)
@pytest.mark.parametrize(
    ("format", "at"),
    [
        ("coco", ("images", 1, "file_name")),
        ("coco", ("images", 1, "id")),
        ("coco", ("annotations", 1, "caption")),
        ("coco", ("annotations", 1, "image_id")),
        ("coco set", ("annotations", 1)),
        ("coco set", ("images", 1, "file_name")),
        ("captions of an index", ("000000000002.jpg",)),
        ("vist", ("annotations", 1, 0, "text")),
        ("vist", ("annotations", 1, 0, "photo_flickr_id")),
        ("flickr30k", ("images", 1, "sentences", 0, "raw")),
        ("instances", ("annotations", 1, "bbox", 0)),
        ("masks", ("annotations", 1, "segmentation")),
        ("masks", ("annotations", 1, "segmentation", 0)),
        ("regions", (1, "regions", 1, "phrase")),
        ("regions", (1, "regions", 1, "x")),
        ("objects", (1, "objects", 1, "names")),
        ("objects", (1, "objects", 1, "names", 0)),
    ],
)
def test_one_odd_entry_costs_no_more_than_itself(places, tmp_path, format, at, value):
    good, read = places[format]
    content = (
        changed(json.loads(good.read_text()), at, value)
        if format != "captions of an index"
        else dict(json.loads(good.read_text()), odd=value)
    )
    (path := tmp_path / "a.json").write_text(json.dumps(content))
    said = told(lambda: read(path))
    assert not said or re.search("left out|skipped", said[0]), said


@pytest.mark.parametrize(
    "line",
    [
        b"[",
        b"{}",
        b"null",
        b'{"image": null, "captions": ["x"]}',
        b'{"image": "a.jpg", "captions": 5}',
        b"\xff\xfe",
        b"9" * 5000,
        DEEP.encode(),
        b"a\0b\tc\0d",
    ],
    ids=lambda line: repr(line[:20]),
)
@pytest.mark.parametrize("format", ["tsv", "jsonl", "pope"])
def test_one_odd_line_costs_no_more_than_itself(places, tmp_path, format, line):
    good, read = places[format]
    lines = good.read_bytes().splitlines()
    (path := tmp_path / f"a{good.suffix}").write_bytes(b"\n".join([*lines[:5], line, *(lines[5:] * 9)[:200]]))
    if format == "pope":
        said = told(lambda: read(path))
        assert said and ("left out" in said[0] or "save" in said[0])
    else:
        assert read(path).images > 30


SIZES = [
    "[1]",
    "no",
    '{"a.tar": null}',
    '{"a.tar": "x"}',
    '{"a.tar": NaN}',
    '{"a.tar": 1e999}',
    '{"a.tar": -1}',
    '{"a.tar": [1]}',
    DEEP,
    "9" * 5000,
    "",
    "\ufeff",
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda text: text[:20])
def test_sizes_of_shards_that_are_odd(tmp_path, sizes):
    (tmp_path / "sizes.json").write_text(sizes)
    assert told(lambda: read_sizes(tmp_path))


def tarred(*members, mode="w", format=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=format) as tar:
        for header, data in members:
            tar.addfile(header, io.BytesIO(data) if data else None)
    return file.getvalue()


def member(name, data=b"", **fields):
    header = tarfile.TarInfo(name)
    header.size = len(data)
    for field, value in fields.items():
        setattr(header, field, value)
    return header, data


def png(color="red"):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(file, "PNG")
    return file.getvalue()


def claimed(header, size):
    """A tar of one header alone, which claims a size."""
    header.size = size
    return header.tobuf(tarfile.GNU_FORMAT)


GOOD = [each for i in range(30) for each in (member(f"k{i}.png", png()), member(f"k{i}.txt", b"a star"))]
TARS = {
    "empty": b"",
    "zeros": bytes(10240),
    "junk": b"junk" * 999,
    "an image": png(),
    "truncated": tarred(*GOOD)[:5000],
    "a damaged header": tarred(*GOOD).replace(b"k9.png", b"k9.p\xffg", 1),
    "a link": tarred(*GOOD, member("z.png", type=tarfile.SYMTYPE, linkname="../z.png"), member("z.txt", b"z")),
    "a hard link to itself": tarred(*GOOD, member("z.png", type=tarfile.LNKTYPE, linkname="z.png"), member("z.txt", b"z")),
    "a device": tarred(*GOOD, member("z.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5), member("z.txt", b"z")),
    "a pipe": tarred(*GOOD, member("z.png", type=tarfile.FIFOTYPE)),
    "folders": tarred(member("d", type=tarfile.DIRTYPE), *GOOD),
    "twice the same": tarred(*GOOD, member("k29.png", png())),
    "Latin-1": tarred(*GOOD[:-2], member("caf\udce9.png", png()), member("caf\udce9.txt", b"x"), format=tarfile.GNU_FORMAT),
    "no dot": tarred(*GOOD, member("z", b"z")),
    "a claim of 8 GB": claimed(member("z.png")[0], 8 << 30),
    "a claim of a terabyte": claimed(member("z.png")[0], 1 << 40),
    "a negative claim": claimed(member("z.png")[0], -1),
    "a name of a terabyte": claimed(member("z.png", type=tarfile.GNUTYPE_LONGNAME)[0], 1 << 40),
    "fields of a terabyte": claimed(member("z.png", type=tarfile.XHDTYPE)[0], 1 << 40),
    "sparse": claimed(member("z.png", type=tarfile.GNUTYPE_SPARSE)[0], 512) + bytes(1024),
    "a sparse map of no numbers": tarred(
        member("z.png", b"x", pax_headers={"GNU.sparse.map": "a,b", "GNU.sparse.size": "9"})
    ),
    "a size of no number": tarred(member("z.png", b"x", pax_headers={"size": "x"})),
    "a negative size": tarred(member("z.png", b"x", pax_headers={"size": "-99999"})),
    "a caption of UTF-16": tarred(*GOOD, member("z.png", png()), member("z.txt", "é".encode("utf-16"))),
    "captions of numbers": tarred(*GOOD, member("z.png", png()), member("z.json", b'{"captions": [5, null]}')),
    "deep captions": tarred(
        *GOOD, member("z.png", png()), member("z.txt", b"z"), member("z.json", b'{"captions": ' + DEEP.encode())
    ),
}
TARS |= {f"gzipped {name}": gzip.compress(data) for name, data in TARS.items() if data}
TARS |= {"gzip cut off": gzip.compress(tarred(*GOOD))[:-40], "gzip damaged": gzip.compress(tarred(*GOOD))[:60] + bytes(99)}


@pytest.mark.parametrize("name", TARS)
def test_shards_that_are_odd(tmp_path, name):
    (path := tmp_path / "0.tar").write_bytes(TARS[name])
    report = check_shards(str(path))
    text = report.text()
    text.encode()
    assert not PYTHON.search(text), text
    fine = ("folders", "no dot", "deep captions", "a pipe")
    if not name.removeprefix("gzipped ").startswith(fine):
        assert report.bad.total(), text
    assert told(lambda: open_image(f"{path}#nobody"))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text):
    data = text.encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(data)) + data


NPYS = {
    "empty": b"",
    "junk": b"junk" * 99,
    "a pickle": pickle.dumps([1.0]),
    "a zip": b"PK\3\4" + bytes(60),
    "half": npy(np.ones(768, np.float32))[:1000],
    "another width": npy(np.ones(5, np.float32)),
    "whole numbers": npy(np.ones(768, np.int64)),
    "NaN": npy(np.full(768, np.nan, np.float32)),
    "a matrix": npy(np.ones((2, 768), np.float32)),
    "a scalar": npy(np.float32(1)),
    "texts": npy(np.array(["a"] * 768)),
    "a claim of a terabyte": header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n"),
    "a negative shape": header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n") + bytes(64),
    "a program": header("__import__('os').system('false')\n"),
    "deep": header("(" * 9000),
    "an open bracket": header("{'descr': '<f4', 'shape': (7\n"),
    "version 9": b"\x93NUMPY\x09\x00" + bytes(99),
}


@pytest.mark.parametrize("name", NPYS)
def test_stored_features_that_are_odd(tmp_path, name):
    good = npy(np.ones(768, np.float32))
    some = [each for i in range(30) for each in (member(f"k{i}.npy", good), member(f"k{i}.txt", b"a star"))]
    (tmp_path / "0.tar").write_bytes(tarred(*some, member("z.npy", NPYS[name]), member("z.txt", b"z")))
    report = check_shards(str(tmp_path / "0.tar"))
    assert len(report.names) == 30 and report.bad.total() == 1 and "#z" in report.text()
    assert not PYTHON.search(report.text()), report.text()


YAMLS = {
    "empty": b"",
    "a list": b"[]",
    "a text": b"words",
    "broken": b"a: [",
    "tabs": b"a:\n\t- b",
    "UTF-16": "model: {}".encode("utf-16-le"),
    "Latin-1": b"model: {lm: caf\xe9}",
    "null": b"\0" * 99,
    "an object of Python": b"a: !!python/object/apply:os.system [false]",
    "deep": b"[" * 5000,
    "words for numbers": b"trainer: {}\nmodel: {k: many}\ndata: {batch_size: [1]}",
    "sections of no mapping": b"trainer: 5\nmodel: [1]\ndata: x",
}


@pytest.mark.parametrize("name", YAMLS)
@pytest.mark.parametrize("command", ["plan", "fit"])
def test_configurations_that_are_odd(tmp_path, capsys, monkeypatch, command, name):
    (path := tmp_path / "odd.yaml").write_bytes(YAMLS[name])
    monkeypatch.chdir(tmp_path)
    try:
        code = main([command, "--config", str(path), *(["--trainer.max_steps=0"] if command == "fit" else [])])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said and not re.search(r"\b(Type|Value|Key|Attribute)Error\b", said), said


@pytest.mark.parametrize("name", ["c_fnnull.json", "c_list.json", "c_null.json", "c_num.json", "c_surro.json"])
def test_one_of_three_entries_is_left_out_of_the_shards(tmp_path, capsys, folder, name):
    """Through the command line, whose report names it."""
    files = sorted(path.name for path in folder.glob("*.png"))[:3]
    images = [{"id": i, "file_name": file} for i, file in enumerate(files)]
    notes: list = [{"image_id": i, "caption": "a circle"} for i in range(3)]
    odd = {"c_null": None, "c_list": ["a"], "c_num": 5, "c_surro": "half \ud83d"}.get(name.partition(".")[0])
    (images if "fn" in name else notes)[1]["file_name" if "fn" in name else "caption"] = odd
    (tmp_path / name).write_text(json.dumps({"images": images, "annotations": notes}))
    assert main(["shards", "coco", str(tmp_path / name), "--images", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "2 images with 2 captions packed" in (out := capsys.readouterr().out) and "[1]" in out and not PYTHON.search(out)
