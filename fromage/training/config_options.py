"""Options of a run from its configurations, as a dataclass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from fromage.errors import UserError

RunT = TypeVar("RunT")


def options_of(configs: str | Sequence[str]) -> dict[str, Any]:
    """The options of the trainer, model and data of configurations, a later one before an earlier one."""
    found: dict[str, Any] = {}
    for config in [configs] if isinstance(configs, str) else configs:
        tree = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        for section in (tree.get(name) for name in ("trainer", "model", "data")):
            found |= section.get("init_args", section) if isinstance(section, dict) else {}
    return found


def model_of(configs: Sequence[str]) -> str:
    """The name of the class whose run configurations describe; '' where they name none."""
    sections = [yaml.safe_load(Path(config).read_text(encoding="utf-8")).get("model") for config in configs]
    paths = [section["class_path"] for section in sections if isinstance(section, dict) and "class_path" in section]
    return str(paths[-1]).rpartition(".")[2] if paths else ""


def run_of(kind: type[RunT], found: Mapping[str, Any], configs: str | Sequence[str]) -> RunT:
    """A dataclass from those options that are its fields. Raises UserError for values of another type."""
    named = "configuration " + (configs if isinstance(configs, str) else ", ".join(configs))
    hints = get_type_hints(kind)
    given = {f.name: found[f.name] for f in fields(kind) if found.get(f.name) is not None}  # type: ignore[arg-type]
    return kind(**{name: _as(_plain(hints[name]), value, f"{named}: {name}") for name, value in given.items()})


def _plain(kind: Any) -> Any:
    """The type of an option, without None; str for a choice of texts."""
    if get_origin(kind) is Literal:
        return str
    return next((_plain(part) for part in get_args(kind) if part is not type(None)), kind)


def check_known(kind: type, given: Iterable[str], configs: Sequence[str]) -> None:
    """Raise UserError for options that a kind of run does not have."""
    for name in sorted(set(given) - {f.name for f in fields(kind)}):
        raise UserError(f"--{name.replace('_', '-')}: means nothing for the model of {', '.join(configs)}; leave it out")


def check_choices(run: Any, choices: Mapping[str, Iterable[str | None]]) -> None:
    """Raise UserError for an option that has none of its values."""
    for name, known in choices.items():
        if getattr(run, name) not in known:
            raise UserError(f"{name} {getattr(run, name)}: choose one of {', '.join(filter(None, known))}")


def _as(kind: type, value: Any, name: str) -> Any:
    """A value of a configuration as a kind of number, or a text."""
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a text")
    try:
        found = kind(value)
        if found != value and (kind is bool or (kind is int and not isinstance(value, str))):
            raise ValueError(value)  # 2.9 is no 2, and "no" is not true
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{name} is {str(value)[:40]!r}, not {wanted}") from error
    return found
