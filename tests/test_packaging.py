"""What wheel and source distribution hold, and that an installed one finds its configurations and its toy towers."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest

import fromage
from fromage.distribution import DISTRIBUTION, pip_install, versions

ROOT = Path(__file__).resolve().parents[1]


BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def build(kind, source, out):
    """What `python -m build` does for one kind, without its own environment."""
    words = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(words, cwd=source, check=True, capture_output=True, text=True)
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, of the files that git knows."""
    out = tmp_path_factory.mktemp("sdist")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (out / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (out / "source" / name).write_bytes((ROOT / name).read_bytes())
    return build("sdist", out / "source", out)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the source distribution."""
    out = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as tar:
        tar.extractall(out, filter="data")
    return build("wheel", next(path for path in out.iterdir() if path.is_dir()), out)


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


def test_they_have_the_version_the_licence_and_both_commands(wheel, sdist):
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    stem = f"{DISTRIBUTION.replace('-', '_')}-{config['metadata']['version']}"
    assert wheel.name == f"{stem}-py3-none-any.whl" and sdist.name == f"{stem}.tar.gz"
    with zipfile.ZipFile(wheel) as file:
        about = {
            name.partition(".dist-info/")[2]: file.read(name).decode() for name in file.namelist() if ".dist-info/" in name
        }
    assert re.search("^License(-Expression)?: Apache-2.0$", about["METADATA"], re.MULTILINE)
    assert "Requires-Python: >=3.11\n" in about["METADATA"]
    assert (ROOT / "README.md").read_text("utf-8").splitlines()[0] in about["METADATA"]
    assert (ROOT / "LICENSE").read_text("utf-8") == about["licenses/LICENSE"]
    commands = {name: f"{name} = fromage.cli.main:main" for name in ("fromage", "lightning")}
    assert all(command in about["entry_points.txt"] for command in commands.values())
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"LICENSE", "README.md", "setup.cfg", "pyproject.toml", "lightning_configs/cc3m.yaml"} <= names


SEARCHED = """
import fromage, sys
from fromage.toy.world import make_world
from pathlib import Path
make_world(Path("world"), seed=1, train=2, val=6, stories=1, dialogues=1, refs=1, progress=False)
fromage.Fromage.load(k=1, q=8).save_pretrained("model")
print(fromage.__file__)
"""


@pytest.mark.skipif(not os.environ.get("FROMAGE_TEST_INSTALL"), reason="takes minutes; FROMAGE_TEST_INSTALL=1 runs it")
def test_an_installed_wheel_makes_an_index_and_searches_it(wheel, tmp_path):
    """In an environment of its own, which borrows the libraries of this one but not the package."""
    venv.create(tmp_path / "venv")
    bin, env = tmp_path / "venv" / "bin", {"PATH": "/usr/bin:/bin", "PYTHONPATH": sysconfig.get_path("purelib")}
    env |= {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = ["-m", "pip", "--python", bin / "python", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, *map(str, words)], check=True)

    def did(*words):
        return subprocess.run([str(bin / words[0]), *words[1:]], cwd=tmp_path, env=env, text=True, check=True,
                              capture_output=True).stdout  # fmt: skip

    assert did("python", "-c", SEARCHED).split()[-1].startswith(str(tmp_path / "venv"))
    assert "index build" in did("fromage", "--help")
    did("fromage", "index", "build", "--ckpt", "model", "--images", "world/coco/val2017", "--out", "index")
    found = did("fromage", "search", "--index", "index", "a red star.", "-k", "3")
    assert len(re.findall(r"world/coco/val2017/\d+\.jpg", found)) == 3


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
    assert len(named) > 5 and named <= set(extras) and pip_install("ray") == "pip install '.[ray]' in FROMAGe's folder"
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
