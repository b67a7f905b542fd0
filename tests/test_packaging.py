"""What a wheel holds, and that an installed one finds its configurations and its toy towers."""

import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest

import fromage
from fromage.distribution import DISTRIBUTION, pip_install, versions

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
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "fromage").rglob("*.py")} <= names
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


def test_messages_name_the_package_as_it_is_installed():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["name"] == DISTRIBUTION and version(DISTRIBUTION) == fromage.__version__
    extras = config["options.extras_require"]
    asked = [
        re.findall(r"pip_install\((.)([\w-]+)\1\)", path.read_text("utf-8")) for path in (ROOT / "fromage").rglob("*.py")
    ]
    named = {extra for found in asked for _, extra in found}
    assert len(named) > 5 and named <= set(extras) and pip_install("ray") == f"pip install '{DISTRIBUTION}[ray]'"
    said = [path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*"))
            if re.search(r"pip install '?fromage(?!-torch)", path.read_text("utf-8"))]  # fmt: skip
    assert not said
    assert versions(["fromage", "no such one"]) == {"fromage": version(DISTRIBUTION), "no such one": "unknown"}


def test_the_demo_needs_no_ray_no_milvus_and_no_tools_of_developers():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    (extras,) = re.findall(r"^\.venv/demo: EXTRAS := (.*)$", makefile, re.MULTILINE)
    assert "\ndemo: .venv/demo\n" in makefile and "\ntest: .venv/ready\n" in makefile
    needed = config["options"]["install_requires"] + "".join(config["options.extras_require"][e] for e in extras.split(","))
    assert not re.search("ray|milvus|pytest|ruff|mkdocs|peft|bitsandbytes|playwright", needed)


def test_every_package_of_a_run_has_its_version():
    """constraints.txt pins what setup.cfg asks for."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = "\n".join([config["options"]["install_requires"], *config["options.extras_require"].values()])
    names = {re.sub("[-_]", "-", found.lower()) for found in re.findall(r"^([\w-]+)", wanted, re.MULTILINE)}
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert names - {DISTRIBUTION} <= {re.sub("[-_]", "-", name.lower()) for name in pinned}
