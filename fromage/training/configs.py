"""Where configurations are found."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import yaml

from fromage.errors import UserError, reason


def config_folder() -> Path:
    """lightning_configs/: within the package when installed from a wheel, beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "lightning_configs"
    return inside if inside.is_dir() else package.parent / "lightning_configs"


def find_config(name: str) -> str:
    """A configuration as given, else in lightning_configs/. Raises UserError where there is none, or it is no YAML."""
    for path in (Path(name), config_folder() / name, config_folder() / f"{name}.yaml"):
        if path.is_file():
            _check_yaml(path)
            return str(path)
    known = ", ".join(sorted(str(p.relative_to(config_folder())) for p in config_folder().rglob("*.yaml")))
    raise UserError(f"configuration {name}: no such file, neither here nor among {known}")


def described() -> dict[str, str]:
    """The configurations of lightning_configs/, and what each is: the beginning of the comment at its top."""
    told = {}
    for path in sorted(config_folder().glob("*.yaml")):
        comment = itertools.takewhile(lambda line: line.startswith("# "), path.read_text(encoding="utf-8").splitlines())
        told[path.name] = re.split(r"[.:;] ", " ".join(line[2:] for line in comment), maxsplit=1)[0]
    return told


def _check_yaml(path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        odd = {UnicodeDecodeError: "not UTF-8; save it as UTF-8", RecursionError: "nested too deep"}
        said = odd.get(type(error)) or " ".join((str(error) if isinstance(error, yaml.YAMLError) else reason(error)).split())
        raise UserError(f"configuration {path}: cannot be read ({said})") from error
    sections = content.values() if isinstance(content, dict) else ()
    if not isinstance(content, dict) or any(isinstance(section, list) for section in sections):
        raise UserError(f"configuration {path}: not a mapping of trainer, model and data; see {config_folder()}")


def with_configs_found(argv: list[str]) -> list[str]:
    """A command line with the files its --config options name."""
    out: list[str] = []
    for before, word in zip(["", *argv], argv, strict=False):
        if before in ("--config", "-c"):
            out.append(find_config(word))
        elif word.startswith("--config="):
            out.append("--config=" + find_config(word.removeprefix("--config=")))
        else:
            out.append(word)
    return out
