"""The name of the installed package: `fromage` is another project on the package index, so ours is fromage-torch there."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "fromage-torch"


def pip_install(extra: str) -> str:
    """The command that installs what an extra of setup.cfg names; the project is installed from a clone."""
    return f"pip install '.[{extra}]' in FROMAGe's folder"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of installed packages, ours as 'fromage'; 'unknown' for one that runs from its source alone."""
    return {package: _version(DISTRIBUTION if package == "fromage" else package) for package in packages}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
