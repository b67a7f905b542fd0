"""A conversation in the terminal: each line is a turn; images are given and shown by path.

    > Which of these is a star? @sky.jpg or @"my other image.png"
    > /save page.png

Text appears while it is decoded; Ctrl-C stops an answer, SIGTERM the program. An error is one line, and the
conversation continues.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from fromage.apps.screen import Screen
from fromage.errors import Terminated, UserError
from fromage.generation.chat import Chat, Turn
from fromage.generation.options import HELP, LIMITS, is_whole
from fromage.generation.retrieved import RetrievedImages
from fromage.images.codec import to_png
from fromage.io import write_files, writing
from fromage.models.prompts import Part, Url, path_or_url
from fromage.retrieval.results import Opened, draw_hits

# An image is at the start of a word; punctuation after an unquoted path belongs to the text.
IMAGE = re.compile(r'(?<![^\s(])@(?:"([^"]+)"|([^\s@]\S*?)(?=[.,;:!?)]*(?:\s|$)))')
DOUBLED = re.compile(r"(?<![^\s(])@@")
SETTINGS = {f"/{name.replace('_', '-')}": name for name in LIMITS}  # command: option of the decoding


def talk(chat: Chat, read: Callable[[str], str] = input, out: TextIO | None = None) -> None:
    """Run the conversation until the input ends.

    Args:
        read: prints a prompt and returns the next line, like `input`; EOFError ends the conversation.
        out: by default standard output.
    """
    session, prompt = Session(chat, Screen(out)), "> " if sys.stdin.isatty() else ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if prompt:
        with suppress(ImportError):
            import readline  # noqa: F401  input() then knows the arrow keys and a history
        session.screen.line("@image.jpg shows an image, /help lists the commands")
    _loop(session, read, prompt)


def _loop(session: Session, read: Callable[[str], str], prompt: str) -> None:
    screen, interrupts = session.screen, 0  # in a row
    while interrupts < 2:
        try:
            screen.fresh = not prompt
            line = read(prompt)
            screen.fresh, interrupts = True, 0
            session.take(line)
        except EOFError:
            break
        except UserError as error:
            screen.complain(str(error))
        except Terminated:
            raise
        except KeyboardInterrupt:
            interrupts += 1
            screen.line("(stopped; the turn is forgotten)" if interrupts < 2 else "")
    screen.line()


def parse(line: str) -> list[Part]:
    """Text and images of a line, in order: @path, @"path", @http://address at the beginning of a word; @@ is an @."""
    parts: list[Part] = []
    end = 0
    for match in IMAGE.finditer(line):
        parts += [*_text(line[end : match.start()]), _image(match[1] or match[2])]
        end = match.end()
    return [*parts, *_text(line[end:])]


def _text(words: str) -> list[Part]:
    """The text of a part, without spaces before an image; no part for spaces alone."""
    return [DOUBLED.sub("@", words.rstrip())] if words.strip() else []


def _image(name: str) -> Part:
    place = path_or_url(name)
    with suppress(RuntimeError):  # ~nobody
        return place.expanduser() if isinstance(place, Path) else place
    return place


class Session:
    """A conversation and its screen."""

    def __init__(self, chat: Chat, screen: Screen) -> None:
        self.chat, self.screen = chat, screen

    def take(self, line: str) -> None:
        """Run a line: a turn or a command. Raises UserError for an impossible one, and EOFError at the end."""
        line = line.strip()
        if not line.startswith("/") or line.startswith("//"):
            self.turn(parse(line[1:] if line.startswith("//") else line))
            return
        name, _, words = line.partition(" ")
        if name not in COMMANDS:
            raise UserError(f"{name}: no such command; /help lists them, and // at the front makes it text")
        argument, _, command = COMMANDS[name]
        if words and not argument:
            raise UserError(f"{name} {words.strip()}: {name} takes no argument; leave it out")
        command(self, name, words.strip())

    def turn(self, parts: list[Part]) -> None:
        """Send the parts, and show the answer while it is decoded."""
        if not parts:
            return
        with closing(self.chat.stream(*parts)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                if isinstance(piece, str):
                    self.screen.say(piece)
                else:
                    self.show(piece)
        self.screen.line("" if self.chat.turns[-1].answer.parts else "(no answer)")

    def show(self, shown: RetrievedImages) -> None:
        """Show the images of a [RET]: rank, score, path and caption of each, and the image itself."""
        for note in shown.notes:
            self.screen.line(f"  {note}")
        if shown.why_empty:
            self.screen.line(f"  [an image; {shown.why_empty}]")
        for hit, image in zip_longest(shown.hits, shown.images):
            self.screen.line(hit.line())
            if image:
                self.screen.image(image)

    def reset(self, name: str, words: str) -> None:
        """Remove all turns."""
        self.chat.reset()
        self.screen.line("(all is forgotten)")

    def undo(self, name: str, words: str) -> None:
        """Remove the last turn."""
        if not self.chat.turns:
            raise UserError("/undo: there is no turn to take back; say something first")
        self.screen.line(f"(taken back: {_said(self.chat.turns[-1].said)})")
        self.chat.undo()

    def set(self, name: str, words: str) -> None:
        """Change a decoding option, or print its value."""
        field = SETTINGS[name]
        kind = int if is_whole(field) else float
        if words:
            try:
                number: dict[str, Any] = {field: kind(words)}
                self.chat.decoding = replace(self.chat.decoding, **number)
            except ValueError:
                raise UserError(f"{name} {words}: wants {'a whole' if kind is int else 'a'} number") from None
            except UserError as error:
                raise UserError(str(error).replace(field, name)) from None
        self.screen.line(f"({name[1:]} is {getattr(self.chat.decoding, field)})")

    def save(self, name: str, words: str) -> None:
        """Write a contact sheet of all images shown, with the turns they answer."""
        path = Path(words)
        if path.suffix.lower() != ".png":
            raise UserError(f"{name} {words}: name a file that ends in .png")
        if not path.parent.is_dir():
            raise UserError(f"{name} {words}: there is no folder {path.parent}; create it first, or name another")
        pages = [(_said(turn.said), opened) for turn in self.chat.turns if (opened := _opened(turn))]
        if not pages:
            raise UserError(f"{name}: no image has been shown yet; ask for one, or raise /ret-bias")
        with writing(path):
            there = path.exists()
        if there:
            raise UserError(f"{name} {words}: is there already; name another file")
        write_files(
            path.parent, {path.name: to_png(draw_hits([said for said, _ in pages], [opened for _, opened in pages]))}
        )
        self.screen.line(f"(drawn: {path})")

    def help(self, name: str, words: str) -> None:
        """List the commands."""
        for command, (argument, does, _) in COMMANDS.items():
            self.screen.line(f"  {command + ' ' + argument:21} {does}")
        self.screen.line('  @sky.jpg @"my sky.jpg" @https://... within a line are images; @@ is an @, // at the front a /')

    def quit(self, name: str, words: str) -> None:
        """End the conversation."""
        raise EOFError


def _opened(turn: Turn) -> list[Opened]:
    return [pair for shown in turn.answer.shown for pair in zip(shown.hits, shown.images, strict=False)]


def _said(parts: list[Part]) -> str:
    return " ".join(f"@{part}" if isinstance(part, (Path, Url)) else part for part in parts if isinstance(part, (str, Path)))


COMMANDS: dict[str, tuple[str, str, Callable[[Session, str, str], None]]] = {
    "/reset": ("", "forget the conversation", Session.reset),
    "/undo": ("", "take the last turn back", Session.undo),
    **{command: ("N" if is_whole(name) else "X", HELP[name].rstrip("."), Session.set) for command, name in SETTINGS.items()},
    "/save": ("FILE.png", "draw the images shown so far into a file", Session.save),
    "/help": ("", "this list", Session.help),
    "/quit": ("", "end, as Ctrl-D does", Session.quit),
}
