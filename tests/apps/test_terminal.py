"""The terminal chat: what a line means, what is printed, that errors are one line, and that nothing foreign gets through."""

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from fromage.apps.screen import Screen, iterm, kitty, protocol
from fromage.apps.terminal import COMMANDS, parse, talk
from fromage.errors import Terminated
from fromage.generation.chat import Chat
from fromage.generation.generate import Answer
from fromage.generation.options import Decoding
from fromage.generation.retrieved import RetrievedImages
from fromage.models.prompts import Url
from fromage.retrieval.results import Hit

IMAGES_PLEASE = Decoding(max_new_tokens=6, ret_bias=1e4)
EVIL = "a cat\x1b[31m\x1b]0;title\x07\x9b2J\r\nnot a line of its own\u202e"


@pytest.fixture(scope="module")
def folder(folder):
    (folder / "notes.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def caption():
    return EVIL


def reading(*lines):
    """Lines as `input` gives them; an exception among them is raised in its turn."""
    rest = iter(lines)

    def read(prompt):
        line = next(rest, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    return read


def said(chat, *lines):
    out = io.StringIO()
    talk(chat, reading(*lines), out)
    return out.getvalue()


# --- what a line means ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("a star", ["a star"]),
        ("@a.jpg", [Path("a.jpg")]),
        ("is @a.jpg or @sub/b.png, a star?", ["is", Path("a.jpg"), " or", Path("sub/b.png"), ", a star?"]),
        ('see @"my sky.jpg"and (@b.png).', ["see", Path("my sky.jpg"), "and (", Path("b.png"), ")."]),
        ("@https://a.b/c.jpg?d=1 red", [Url("https://a.b/c.jpg?d=1"), " red"]),
        ('@"http://a.b/c (1).jpg"', [Url("http://a.b/c (1).jpg")]),
        ("me@home.org at https://a.b/@c @ noon", ["me@home.org at https://a.b/@c @ noon"]),
        ("@@home @@", ["@home @"]),
        ("@a.jpg @b.jpg", [Path("a.jpg"), Path("b.jpg")]),
        ("", []),
    ],
)
def test_text_and_images_of_a_line(line, parts):
    found = parse(line)
    assert found == parts and [type(part) for part in found] == [type(part) for part in parts]


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/elsewhere")
    assert parse("@~/a.jpg @~nobody-of-that-name/a.jpg") == [Path("/elsewhere/a.jpg"), Path("~nobody-of-that-name/a.jpg")]


# --- turns ------------------------------------------------------------------------------------------------------------


def test_text_comes_as_the_conversation_itself_gives_it(model, index, folder):
    chat, other = (Chat(model, index, Decoding(max_new_tokens=8, max_images=0)) for _ in range(2))
    shown = said(chat, f'a star @"{folder / "red.png"}" or a ring?')
    answer = other.say("a star", folder / "red.png", " or a ring?")
    assert shown == f"{answer.text}\n"
    assert [type(part) for part in chat.turns[0].said] == [str, type(folder), str]


def test_images_are_printed_with_rank_score_path_and_caption(model, index, folder):
    chat = Chat(model, index, IMAGES_PLEASE)
    shown = said(chat, "/images-per-ret 5", f'a star @"{folder / "red.png"}"')
    hits = chat.turns[0].answer.shown[0].hits
    assert {Path(hit.path) for hit in hits} == set(folder.iterdir()) - {folder / "red.png", folder / "notes.png"}, (
        "not the user's own"
    )
    for hit in hits:
        assert f"  {hit.rank:3d}  {hit.score:.3f}  {hit.path}  a cat" in shown.splitlines()[hit.rank]


def test_an_image_without_an_index_is_told_of(model):
    assert "there is no index" in said(Chat(model, None, IMAGES_PLEASE), "a star")


def test_two_slashes_are_a_text(model):
    chat = Chat(model, decoding=Decoding(max_new_tokens=2))
    said(chat, "//quit", "   ")
    assert [turn.said for turn in chat.turns] == [["/quit"]]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_errors_are_one_line_and_the_conversation_goes_on(model, index, folder, capsys):
    chat = Chat(model, index, Decoding(max_new_tokens=4, max_images=0))
    wrong = {
        "@nothing.jpg": "nothing.jpg: cannot be read",
        f'@"{folder / "notes.png"}"': "notes.png: undecodable image",
        f'@"{folder}"': "cannot be read",
        "@nul\0.jpg": "cannot be read",
        "@http://localhost/a.jpg": "localhost",
        "a star " * 600: "shorten it",
        "/nonsense": "/nonsense: no such command",
        "/undo": "no turn to take back",
        "/undo 3": "/undo takes no argument",
        "/save": "ends in .png",
        "/save page.jpg": "ends in .png",
        "/save page.png": "no image has been shown",
        "/save /nope/page.png": "there is no folder /nope",
        "/ret-bias much": "wants a number",
        "/ret-bias nan": "/ret-bias is nan",
        "/temperature -1": "temperature is -1.0",
        "/images-per-ret 0": "/images-per-ret is 0",
        "/images-per-ret 1.5": "wants a whole number",
        "/nonsense\x1b[31m": "no such command",
    }
    shown = said(chat, *wrong, "a star")
    errors = capsys.readouterr().err.splitlines()
    for error, want in zip(errors, wrong.values(), strict=True):
        assert error.startswith("fromage: ") and want in error and "\x1b" not in error
    assert len(chat.turns) == 1 and shown == f"{chat.turns[0].answer.text}\n" and chat.decoding.ret_bias == 0


def test_ctrl_c_stops_the_answer_alone(model, monkeypatch):
    monkeypatch.setattr(Chat, "stream", broken_off)
    chat = Chat(model)
    assert "thinking\n(stopped" in said(chat, "a star", "/temperature 0.5") and chat.decoding.temperature == 0.5


def broken_off(chat, *parts):
    yield "thinking"
    raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_a_signal_while_decoding_stops_the_decoding_thread(model):
    chat = Chat(model, decoding=Decoding(max_new_tokens=400, min_new_tokens=400, max_images=0))

    class Out(io.StringIO):
        sent = False

        def write(self, text):
            if text.strip() and not self.sent and "(" not in text:
                self.sent = True  # the signal may be taken in a later write
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    out, before = Out(), threading.active_count()
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # by a shell, of what it runs in its background
    try:
        talk(chat, reading("a star"), out)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert "(stopped" in out.getvalue() and chat.turns == [] and threading.active_count() == before


def test_ctrl_c_at_the_prompt_leaves_the_second_time(model):
    chat = Chat(model, decoding=Decoding(max_new_tokens=2))
    shown = said(chat, KeyboardInterrupt, "a star", KeyboardInterrupt, KeyboardInterrupt, "never read")
    assert len(chat.turns) == 1 and shown.count("(stopped") == 2


def test_sigterm_ends_the_conversation_the_first_time(model, monkeypatch):
    def terminated(chat, *parts):
        yield "thinking"
        raise Terminated

    monkeypatch.setattr(Chat, "stream", terminated)
    asked = reading("a star", "never read")
    with pytest.raises(Terminated):
        talk(Chat(model), asked, io.StringIO())
    assert asked("> ") == "never read"


def test_nothing_foreign_reaches_the_terminal(model, index, monkeypatch):
    def stream(chat, *parts):
        yield "\x1b]0;model\x07 words\x9b"
        yield RetrievedImages(None, [Hit(1, 0.5, f"/images/{EVIL}", EVIL)], [Image.new("RGB", (8, 8))], [EVIL])
        chat.turns.append(type("Turn", (), {"said": list(parts), "answer": Answer(["words"], [])}))

    monkeypatch.setattr(Chat, "stream", stream)
    shown = said(Chat(model, index), f"say {EVIL}", "/undo")
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert len(shown.splitlines()) == 4 and "not a line of its own" in shown


# --- commands ---------------------------------------------------------------------------------------------------------


def test_settings_are_exchanged_and_told(model):
    chat = Chat(model)
    shown = said(chat, "/ret-bias 2.5", "/temperature 0.7", "/images-per-ret 3", "/images-per-ret")
    assert (chat.decoding.ret_bias, chat.decoding.temperature, chat.decoding.images_per_ret) == (2.5, 0.7, 3)
    assert shown.splitlines() == [
        "(ret-bias is 2.5)",
        "(temperature is 0.7)",
        "(images-per-ret is 3)",
        "(images-per-ret is 3)",
    ]


def test_undo_reset_and_quit(model):
    chat = Chat(model, decoding=Decoding(max_new_tokens=2))
    shown = said(chat, "a star", "a ring", "/undo", "/quit", "never read")
    assert [turn.said for turn in chat.turns] == [["a star"]] and "(taken back: a ring)" in shown
    said(chat, "/reset")
    assert chat.turns == []


def test_help_lists_every_command(model):
    lines = said(Chat(model), "/help").splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(COMMANDS) and "@@" in lines[-1]


def test_images_shown_are_saved_as_a_page(model, index, folder, tmp_path, capsys):
    chat = Chat(model, index, IMAGES_PLEASE)
    shown = said(chat, "a star", f'@"{folder / "red.png"}"', f"/save {tmp_path / 'the page.png'}", "/save /dev/null/a.png")
    assert "(drawn:" in shown and "no folder /dev/null" in capsys.readouterr().err
    said(chat, f"/save {tmp_path / 'the page.png'}")
    assert "is there already" in capsys.readouterr().err, "it may be the user's own photograph"
    said(chat, "a star", f"/save {'a' * 300}.png")
    assert "the name is too long" in capsys.readouterr().err
    page = Image.open(tmp_path / "the page.png")
    assert page.format == "PNG" and len(list(tmp_path.iterdir())) == 1
    assert len({page.getpixel((x, y)) for x in range(0, page.width, 9) for y in range(0, page.height, 9)}) > 2


# --- terminals --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("environ", "way"),
    [
        ({"TERM_PROGRAM": "iTerm.app", "TERM": "xterm-256color"}, iterm),
        ({"TERM_PROGRAM": "WezTerm"}, iterm),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "221203"}, iterm),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "211204"}, None),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "221203", "TERM_PROGRAM": "vscode"}, None),
        ({"TERM": "xterm-kitty"}, kitty),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, kitty),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "screen", "TERM_PROGRAM": "iTerm.app"}, None),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1", "TERM_PROGRAM": "vscode"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
    ],
)
def test_how_a_terminal_draws(environ, way, monkeypatch):
    assert protocol(environ) is way
    for name in ("TERM", "TERM_PROGRAM", "KITTY_WINDOW_ID", "KONSOLE_VERSION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert Screen(Terminal()).draw is way and Screen(io.StringIO()).draw is None


@pytest.mark.parametrize("size", [1, 3072, 3073, 10_000])
def test_kittys_protocol(size):
    """Chunks of at most 4,096 characters, all but the last of whole groups of four; what they are in the first alone."""
    png = os.urandom(size)
    sequences = re.findall(r"\x1b_G([^;\x1b]*);([^\x1b]*)\x1b\\", kitty(png))
    assert "".join(f"\x1b_G{head};{chunk}\x1b\\" for head, chunk in sequences) == kitty(png)
    heads = [dict(field.split("=") for field in head.split(",")) for head, _ in sequences]
    assert heads[0].items() >= {"a": "T", "f": "100"}.items()  # transmit and display; PNG
    assert all(head.keys() == {"m", "q"} for head in heads[1:])
    assert [head["m"] for head in heads] == ["1"] * (len(heads) - 1) + ["0"]
    chunks = [chunk for _, chunk in sequences]
    assert all(0 < len(chunk) <= 4096 and len(chunk) % 4 == 0 for chunk in chunks)
    assert b"".join(base64.b64decode(chunk, validate=True) for chunk in chunks) == png


def test_iterms_protocol():
    """The arguments, and the file in base64; a size that is too small breaks the transfer off."""
    png = os.urandom(10_000)
    said = re.fullmatch(r"\x1b\]1337;File=([^:]*):([A-Za-z0-9+/=]*)\x07", iterm(png))
    arguments = dict(field.split("=") for field in said[1].split(";"))
    assert arguments == {"inline": "1", "preserveAspectRatio": "1", "size": "10000"}
    assert base64.b64decode(said[2], validate=True) == png


def test_a_terminal_that_can_draws_the_images(model, index, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-kitty")
    for name in ("TERM_PROGRAM", "KONSOLE_VERSION"):
        monkeypatch.delenv(name, raising=False)
    out = Terminal()
    talk(Chat(model, index, IMAGES_PLEASE), reading("a star"), out)
    assert out.getvalue().count("\x1b_G") == 1 and out.getvalue().count("\x1b") == 2


def test_text_the_terminal_cannot_encode_is_replaced():
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    Screen(out).line("a 猫")
    assert out.buffer.getvalue() == b"a ?\n"


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_reads_lines_from_a_pipe(toy_model, tmp_path):
    toy_model.save_pretrained(tmp_path / "model", "float32")
    command = [
        sys.executable,
        "-m",
        "fromage.cli.main",
        "chat",
        "--ckpt",
        str(tmp_path / "model"),
        "--max-new-tokens",
        "4",
    ]
    lines = b"a star\n/nonsense\nbroken \xff bytes\n/undo"
    done = subprocess.run(command, input=lines, capture_output=True, timeout=120)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"> " not in done.stdout
    assert b"fromage: /nonsense: no such command" in done.stderr
    assert "(taken back: broken \N{REPLACEMENT CHARACTER} bytes)" in done.stdout.decode()
