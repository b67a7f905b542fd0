"""README and docs: links lead somewhere, commands are commands, examples run and are typed, the site builds."""

import configparser
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from PIL import Image
from type_checker import type_check

from fromage.cli.main import main
from fromage.training.fit import FITTING

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ODD = ("so-manieth", "held against", "at the pace of memory", "nobody's business", "likewise", "are looked at too")


@cache
def text(page):
    return page.read_text(encoding="utf-8")


def prose(page):
    """Without fenced blocks."""
    return FENCE.sub("", text(page))


def blocks(page, language):
    """(code, what stands in front of it), of the fenced blocks of a language."""
    matches = [m for m in FENCE.finditer(text(page)) if m[1] == language]
    return [(m[2], text(page)[: m.start()].rstrip().rpartition("\n")[2]) for m in matches]


# --- links and files ------------------------------------------------------------------------------------------------


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def links():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if "://" not in target:
                yield pytest.param(page, target, id=f"{page.relative_to(ROOT)}-{target}")


@pytest.mark.parametrize(("page", "target"), links())
def test_link_leads_somewhere(page, target):
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    assert there.is_file() and there.is_relative_to(ROOT)
    assert not anchor or anchor in anchors(there)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_are_there(page):
    spans = re.findall(r"`([^`]+)`", prose(page))
    named = {span for span in spans if re.fullmatch(r"(fromage|tests|tools|notebooks|lightning_configs)/[\w/.]*", span)}
    named |= {word for code in [*spans, text(page)] for word in re.findall(r"python (tools/\w+\.py)", code)}
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_lines_are_short(page):
    lines = [line for line in text(page).splitlines() if not line.startswith(("|", "!["))]  # tables and images go on
    assert page.name == "CHANGELOG.md" or not [line for line in lines if len(line) > 125]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_words_are_plain(page):
    told = " ".join(text(page).lower().split())
    assert not [words for words in ODD if words in told]
    assert "picture" not in told or page.name in ("CHANGELOG.md", "CONTRIBUTING.md")


# --- commands -------------------------------------------------------------------------------------------------------


def commands(lines):
    return {line.partition(" > ")[0] for line in lines if re.match(r"(fromage|lightning) (?!.* \| )\S", line)}


SHELL = [
    line.split("  #")[0].strip()
    for page in PAGES
    for code, _ in blocks(page, "sh")
    for line in re.sub(r" \\\n *", " ", code).splitlines()  # a command may go on in the next line
]
NAMED = [" ".join(span.split()) for page in PAGES for span in re.findall(r"`([^`]+)`", prose(page))]
WHOLE = commands(SHELL)  # those in prose may be without what they need
COMMANDS = sorted(WHOLE | commands(NAMED))


def test_there_are_some():
    assert len(COMMANDS) > 40 and any(" fit " in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command, capsys):
    words = shlex.split(command)[1:]
    fitting = words[0] in FITTING and not {"--help", "--model.help"} & {*words}
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config" if fitting else "--help"])
    assert not stop.value.code
    if words[0] not in FITTING:
        told = capsys.readouterr().out
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert not [option for option in options if not re.search(rf"{option}\b", told)]
        usage = told.partition("\n\n")[0]
        while usage != (usage := re.sub(r"\[[^][]*\]", "", usage)):  # without what may be left out
            pass
        if command in WHOLE and "--help" not in words:
            assert not {*re.findall(r"--[\w-]+", usage)} - options, "an option that is required is missing"


# --- examples -------------------------------------------------------------------------------------------------------


def examples():
    for page, name in zip(PAGES, NAMES, strict=True):
        if page.name != "CONTRIBUTING.md":  # whose blocks are excerpts
            for number, (code, before) in enumerate(blocks(page, "python")):
                yield f"{name}-{number}", code, before.startswith("<!-- type-checked only")


EXAMPLES = list(examples())


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """A folder like a user's after `make demo`: a world, a model of it, its index; some photographs, and pairs."""
    from fromage import Fromage, build_index

    out = tmp_path_factory.mktemp("place")
    demo, photos = out / "runs" / "demo", out / "photos"
    checkpoint = demo / "k4" / "checkpoints" / "last.ckpt"  # a folder here, which is taken as well
    Fromage.load(k=4).save_pretrained(checkpoint, dtype="float32")
    (demo / "world").symlink_to(world)
    model = Fromage.from_pretrained(checkpoint)
    build_index(model, world / "coco" / "val2017", demo / "index_k4", checkpoint=checkpoint)
    photos.mkdir()
    colours = ("red", "green", "blue", "white", "black", "yellow")
    for colour in colours:
        Image.new("RGB", (64, 64), colour).save(photos / f"{colour}.png")
    pairs = [f"a {colour} image, number {number}.\tphotos/{colour}.png\n" for number in range(4) for colour in colours]
    (out / "pairs.tsv").write_text("".join(pairs))
    return out


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code, typed_only in EXAMPLES if not typed_only])
def test_example_runs(code, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out or "trainer.fit" in code


def test_examples_are_short():
    assert len(EXAMPLES) >= 8
    for name, code, _ in EXAMPLES:
        lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("from ", "import "))]
        assert len(lines) <= 10, name


def test_examples_are_typed(tmp_path):
    for number, (name, code, _) in enumerate(EXAMPLES):
        (tmp_path / f"example_{number}.py").write_text(f"# {name}\n{code}", encoding="utf-8")
    done = type_check(*sorted(tmp_path.glob("*.py")))
    assert done.returncode == 0, done.stdout + done.stderr


# --- architecture ---------------------------------------------------------------------------------------------------


def table(heading):
    """The rows of the first table after a heading of docs/architecture.md, its head left out."""
    section = text(DOCS / "architecture.md").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def test_the_reading_order_leads_to_what_it_names():
    rows = table("Reading order")
    assert 8 <= len(rows) <= 12
    for _, file, names, _ in rows:
        code = (ROOT / file.strip("`")).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^ *(def|class) {name}\b|^{name} = ", code, re.MULTILINE), (file, name)


def test_every_file_says_what_it_holds_and_those_that_are_named_are_there():
    files = {path.relative_to(ROOT).as_posix(): text(path) for path in (ROOT / "fromage").rglob("*.py")}
    assert not [file for file, content in files.items() if not re.match(r'"""\S.{9,}', content)]
    named = {*re.findall(r"`(fromage/[\w/]+\.py)`", text(DOCS / "architecture.md"))}
    assert len(named) > 15 and not named - files.keys()


def test_where_to_look_names_modules_that_are_there():
    """The left column of the lists in the docstrings of packages."""
    lists = 0
    for file in sorted((ROOT / "fromage").rglob("__init__.py")):
        if found := re.search(r"^Where to look:\n\n((?: {4}.+\n)+)", text(file), re.MULTILINE):
            lists += 1
            rows = re.findall(r"^ {4}(\S.*)$", found[1], re.MULTILINE)
            named = {name for row in rows for name in row.partition("  ")[0].split(", ")}
            there = {path.stem for path in [*file.parent.glob("*.py"), *file.parent.glob("*/")]}
            assert named and not named - there, file
    assert lists >= 7


def test_the_layers_are_those_of_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    held = [sorted(line.split(" | ")) for line in config["importlinter:contract:layers"]["layers"].split("\n") if line]
    assert [sorted(re.findall(r"`(\w+)`", row[0])) for row in table("Packages")] == held


# --- the site -------------------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    page = (tmp_path / "site" / "api" / "generation.html").read_text(encoding="utf-8")
    assert "max_new_tokens" in page and "&lt;/s" in page  # a token is no tag
    assert not re.findall(r'(?:<script[^>]* src|<link rel="stylesheet" href|<img[^>]* src)="https?:', page)
