"""What jsonargparse says of a wrong option or configuration, in words for people: the option, its value, what is wanted."""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from typing import Any

from fromage.errors import UserError, near

SECTIONS = ("model", "data", "trainer", "ckpt_path", "seed_everything", "optimizer", "lr_scheduler")  # of a configuration
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "a mapping",
    "list": "a list",
    "Iterable": "a list",
    "NoneType": "null",
}
KIND = re.compile(r"typing\.Literal\[(.*?)\]|<class '[\w.]*?(\w+)'>|tuple with (\d+) elements|(dot import path)")


def told(error: argparse.ArgumentError) -> str:
    """What was wrong, in a line, and the option that was probably meant."""
    said = str(error)
    keys = re.findall(r'(?:Parser|for) key "([\w.]+)"', said)
    where = ".".join(keys)
    if found := re.search(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", said):
        front = f"--{where}." if where in ("model", "data") else ""
        return f"{where}.{found[2]}: {found[1]} has no such option" + near(found[2], _options(found[1]), front)
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", said):
        return f"class_path {_no_class(found[1], found[2])}"
    if found := re.search(r"No module named '([\w.]+)'", said):
        return f"{where}.class_path: there is no module {found[1]}; install it, or correct the name"
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", said):
        return f"{where}.class_path is {found[1]}; it must be a {found[2]}"
    if found := re.search(r"(?:unrecognized arguments: --|does not accept option ')(\w+)(\.\w+)?", said):
        return _unknown(found[1], (found[2] or "")[1:])
    if keys:
        return _misfit(where, said.rpartition('Parser key "')[2])
    return " ".join(said.split())[:500]


def _unknown(section: str, option: str) -> str:
    """An option that there is not."""
    meant = near(option, _options("pytorch_lightning.Trainer"), "--trainer.") if section == "trainer" else ""
    name = f"{section}.{option}" if option else section
    return f"{name}: there is no such option" + (meant if section == "trainer" else near(section, SECTIONS, "--"))


def _misfit(where: str, said: str) -> str:
    """A value of the wrong type; said: of the innermost key alone."""
    wanted, _, rest = re.sub("Given value type: .*", "", said).partition(" value: ")
    kinds: list[str] = []
    for choices, name, count, _ in KIND.findall(wanted):
        one = WORDS.get(name, "a class_path with its init_args")
        kinds += [word.strip(" '") for word in choices.split(",")] if choices else [f"{count} values" if count else one]
    value = (rest.strip().splitlines() or ["not as it should be"])[0]
    return f"{where} is {value[:60]}; it must be {' or '.join(dict.fromkeys(kinds)) or 'of another kind'}"


def class_of(path: str) -> Any:
    """A class by its path. Raises UserError where there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise UserError(f"{path}: there is no module {module}; name a class by its path") from error
    except AttributeError as error:
        raise UserError(_no_class(module, name)) from error


def _no_class(module: str, name: str) -> str:
    return f"{module}.{name}: there is no such class" + near(name, dir(import_module(module)), f"{module}.")


def _options(class_path: str) -> list[str]:
    """The options of a class, those included that it passes on."""
    from jsonargparse import ArgumentParser

    return ArgumentParser().add_class_arguments(class_of(class_path), fail_untyped=False)
