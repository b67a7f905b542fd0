"""Commands from signatures: parameters, types, defaults and docstring of a function become arguments, options and --help.

A parameter before the `*` is a positional argument, one after it an option. A bool is a switch: `--name`, or `--no-name`
where the default is True; the docstring says after "--no-name: " what that does. A sequence of texts is an option to repeat,
one of numbers an option that takes several. A dataclass stands for options of its fields. What a docstring does not say of a
parameter, fromage.cli.options does; a path without more is a file to read.

A command returns what it has to say, a `Result` or several one after another: text for people, data for programs. Such a
command has the option --json, and one that writes a file by name has --overwrite. What goes wrong is for standard error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from inspect import Parameter, getmro, isclass, signature
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from fromage.cli.options import BARE, DEFAULT, FILES, HERE, SHARED, SHORT, Check, save
from fromage.printable import one_line

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from PIL import Image


class Result(NamedTuple):
    """What a command has to say: lines for people; data, ready for JSON, for programs; an image, for terminals that draw."""

    text: str
    data: Any
    image: Image.Image | None = None

    @classmethod
    def of(cls, lines: Iterable[str], data: Any, image: Image.Image | None = None) -> Result:
        """A result of some lines, in each of which strangers' words make no other line."""
        return cls("\n".join(map(one_line, lines)), data, image)


Function = Callable[..., Result | Iterator[Result] | None]
Argument = tuple[list[str], dict[str, Any]]  # names and settings of add_argument


def parser_of(name: str, function: Function) -> ArgumentParser:
    """The parser of one command."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"fromage {name}",
        exit_on_error=False,
        description=(function.__doc__ or "").partition("Args:")[0].strip(),
        formatter_class=argparse.HelpFormatter,  # jsonargparse's own prints types and defaults of Python
    )
    for names, settings in arguments(function):
        parser.add_argument(*names, **settings)
    known = options_of(function)
    files = [dashed for name in FILES if (dashed := _dashed(name)) in known]
    if files and "--overwrite" not in known:
        kept = "; --out is not affected" if "--out" in known else ""
        text = f"replace the file of {' or '.join(files)} if it is there{kept}"
        parser.add_argument("--overwrite", action="store_true", help=text)
    return parser


def options_of(function: Function) -> list[str]:
    """The options of a command, as they are typed."""
    return [name for names, _ in arguments(function) for name in names if name.startswith("-")]


def arguments(function: Function) -> Iterator[Argument]:
    """Names and settings of what a command takes."""
    yield from _arguments(function)
    if speaks(function):
        yield _option("json", Path | None, None, *SHARED["json"])


def speaks(function: Function) -> bool:
    """Whether a command has something to say, and so the option --json."""
    return signature(function).return_annotation not in ("None", None, Parameter.empty)


def tell(said: Result | Iterable[Result] | None, file: Path | None) -> None:
    """Print what a command has to say, as it comes: its lines, or with `--json` alone its data, one line of JSON each.

    file: where the data is written besides, when all is said: one result as an object, several as lines of JSON.
    """
    several = not isinstance(said, Result)
    lines: list[str] = []
    for result in [said] if isinstance(said, Result) else said or ():
        if file is not None:
            lines.append(json.dumps(result.data, indent=None if several or file == HERE else 2))
        print(lines.pop() if file == HERE else result.text, flush=True)
        if result.image and file != HERE:
            _draw(result.image)
    if file not in (None, HERE):
        save(file, "".join(f"{line}\n" for line in lines).encode())


def _draw(image: Image.Image) -> None:
    from fromage.apps.screen import Screen

    Screen().image(image)


def call(function: Callable[..., Any], values: dict[str, Any]) -> Any:
    """Call a command's function, or make a dataclass, with what the parser read."""
    hints = get_type_hints(function)
    given = {name: hints[name] for name in signature(function).parameters}
    made = {name: call(kind, values) for name, kind in given.items() if isclass(kind) and is_dataclass(kind)}
    return function(**{name: values[name] for name in given if name not in made} | made)


def _arguments(owner: Any) -> Iterator[Argument]:
    hints, texts = get_type_hints(owner), _texts(owner)
    for name, parameter in signature(owner).parameters.items():
        if is_dataclass(hints[name]):
            yield from _arguments(hints[name])
        else:
            text, check = SHARED.get(name, ("", None))
            check = None if getattr(owner, "checked_later", False) else check or DEFAULT.get(_kind(hints[name])[0])
            option = isclass(owner) or parameter.kind is Parameter.KEYWORD_ONLY
            yield (_option if option else _positional)(name, hints[name], parameter.default, texts.get(name, text), check)


def _texts(owner: Any) -> dict[str, str]:
    """What the docstring says of each parameter; of a dataclass, also what the docstrings of its bases say."""
    from docstring_parser import parse

    docs = [each.__doc__ or "" for each in (getmro(owner)[::-1] if isclass(owner) else (owner,))]
    params = [param for doc in docs for param in parse(doc).params]
    return {param.arg_name: " ".join((param.description or "").rstrip(".").split()) for param in params}


def _positional(name: str, hint: Any, default: Any, text: str, check: Any) -> Argument:
    kind, several = _kind(hint)
    settings: dict[str, Any] = {"type": _checked(kind, check), "help": _plain(text)}
    if default is not Parameter.empty:
        settings |= {"default": list(default) if several else default}
    return [name], settings | ({"nargs": "+" if default is Parameter.empty else "*"} if several else {})


def _option(name: str, hint: Any, default: Any, text: str, check: Any) -> Argument:
    dashed = _dashed(name)
    if hint is bool:
        dashed = f"--no-{dashed[2:]}" if default else dashed
        text = text.rpartition(f"{dashed}: ")[2]
        return [dashed], {"action": "store_false" if default else "store_true", "dest": name, "help": _plain(text)}
    kind, several = _kind(hint)
    required = default is Parameter.empty
    if not required and default not in (None, (), ""):
        text += f" (default: {' '.join(map(str, default)) if several else default})"
    settings = {"type": _checked(kind, check), "help": _plain(text), "dest": name, "required": required}
    settings |= {} if required else {"default": list(default) if several else default}
    if several:
        settings |= {"action": "append"} if kind is str else {"nargs": "+"}
    if name in BARE:
        settings |= {"nargs": "?", "const": BARE[name]}
    return [*([SHORT[name]] if name in SHORT else []), dashed], settings


def _dashed(name: str) -> str:
    """An option as it is typed."""
    return ("--" if name[1:] else "-") + name.replace("_", "-")


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type of one word of a parameter, and whether it takes several words."""
    if NoneType in get_args(hint):
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    several = get_origin(hint) not in (None, Literal)
    return (get_args(hint)[0], True) if several else (hint, False)


def _checked(kind: Any, check: Check | None) -> Any:
    """The type of a word, which is checked first. jsonargparse asks a second time about what it was given then."""
    return kind if check is None else lambda word: kind(check(word)) if isinstance(word, str) else word


def _plain(text: str) -> str:
    return text.replace("%", "%%")


def with_dashes(words: Sequence[str]) -> list[str]:
    """Words of a command line, options with dashes in place of underscores; --trainer.max_steps and the like stay."""
    out = list(words)
    for i, word in enumerate(words[: words.index("--") if "--" in words else None]):
        name, equals, value = word.partition("=")
        if name.startswith("--") and "." not in name:
            out[i] = name.replace("_", "-") + equals + value
    return out
