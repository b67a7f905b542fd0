"""What a wheel holds, and that an installed one finds its configurations and its toy towers."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    build = out / "source"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (build / name).parent.mkdir(parents=True, exist_ok=True)
            (build / name).write_bytes((ROOT / name).read_bytes())
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(build)]
    subprocess.run(words, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_configurations_and_towers(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"fromage/{p.relative_to(ROOT)}" for p in (ROOT / "lightning_configs").rglob("*.yaml")}
    towers = {
        f"fromage/toy/backbones/{kind}/{name}"
        for kind, name in (("opt", "model.safetensors"), ("clip", "open_clip_model.safetensors"))
    }
    assert configs and configs | towers <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]


def test_installed_package_finds_its_own_configurations(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "from fromage.models.frozen import TOY; from fromage.training.configs import find_config; "
        "print(find_config('cc3m.yaml'), TOY.is_dir())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": ""},
                          capture_output=True, text=True, check=True)  # fmt: skip
    found, towers = done.stdout.split()
    assert Path(found) == tmp_path / "fromage" / "lightning_configs" / "cc3m.yaml" and towers == "True"


def test_shipped_towers_are_small():
    sizes = [p.stat().st_size for p in (ROOT / "fromage" / "toy" / "backbones").rglob("*") if p.is_file()]
    assert 0 < sum(sizes) <= 25 * 2**20
