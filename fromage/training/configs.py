"""Where configurations are found."""

from __future__ import annotations

from pathlib import Path

import yaml

from fromage.errors import UserError


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


def _check_yaml(path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration {path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"configuration {path}: not a mapping of trainer, model and data; see {config_folder()}")


def with_configs_found(argv: list[str]) -> list[str]:
    """A command line with the files its --config options name."""
    out = list(argv)
    for i, word in enumerate(out):
        if word in ("--config", "-c") and i + 1 < len(out):
            out[i + 1] = find_config(out[i + 1])
        elif word.startswith("--config="):
            out[i] = "--config=" + find_config(word.removeprefix("--config="))
    return out
