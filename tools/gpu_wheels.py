"""Wheels for a bare GPU machine: what the kit imports and a machine with PyTorch and transformers lacks."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON, MOST = "3.12", 64 * 2**20  # bytes that may be carried
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
# what a machine for PyTorch has, by the names it is imported by
PRESENT = {
    "PIL", "fsspec", "huggingface_hub", "lightning_fabric", "numpy", "peft", "pyarrow", "pytest", "pytorch_lightning",
    "safetensors", "scipy", "torch", "torchmetrics", "torchvision", "tqdm", "transformers", "yaml",
}  # fmt: skip
# what it lacks: name it is imported by -> distribution; the last two are imported by open_clip
CARRIED = {
    "braceexpand": "braceexpand", "faiss": "faiss-cpu", "open_clip": "open_clip_torch", "simplejpeg": "simplejpeg",
    "webdataset": "webdataset", "timm": "timm", "tabulate": "tabulate", "docstring_parser": "docstring_parser",
    "ftfy": "ftfy", "wcwidth": "wcwidth",
}  # fmt: skip


def pinned(names: list[str]) -> list[str]:
    """NAME==VERSION of each, as constraints.txt has it. Raises SystemExit for a name that is not there."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    known = {normal(line.partition("==")[0]): line.strip() for line in lines if "==" in line}
    if missing := [name for name in names if normal(name) not in known]:
        raise SystemExit(f"constraints.txt has no version of {', '.join(missing)}")
    return [known[normal(name)] for name in names]


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def collect(folder: Path) -> int:
    """Download the wheels into a folder and say what they are; 1 where pip fails or they are too large together."""
    wanted = pinned(list(CARRIED.values()))
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    fixed = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *fixed, "--dest", str(folder), *wanted]
    if subprocess.run(command).returncode:
        print("pip could not fetch them all; what it said stands above", file=sys.stderr)
        return 1
    sizes = {wheel.name: wheel.stat().st_size for wheel in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / 2**20:8.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:8.2f} MiB  of {MOST / 2**20:.0f} that may be carried")
    if total > MOST:
        print("too much to carry: leave out what no part of the kit imports", file=sys.stderr)
    return int(total > MOST)


def unpacked(folder: Path | None) -> list[str]:
    """Wheels of a folder, unpacked into a temporary one: [its path], for sys.path; [] for None.

    Raises SystemExit where the folder holds no wheel.
    """
    if folder is None:
        return []
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"{folder}: no wheel is there; python tools/gpu_kit.py --wheels {folder}")
    site = tempfile.mkdtemp(prefix="kit-site-")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return [site]
