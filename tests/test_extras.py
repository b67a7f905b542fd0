"""Each environment that setup.cfg names is enough for what it is for: what it lacks cannot be imported here either."""

import os
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny_gguf import tiny_llama, write_gguf

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = re.search(r"^\.venv/photos: EXTRAS := (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1]


def required(extras):
    """The packages that setup.cfg names for these extras, and what they require in turn, as far as it is installed."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    options = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    found, todo = {}, [Requirement(line) for option in options for line in option.split("\n") if line]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if name in found:
            continue
        try:
            found[name] = distribution(name[0])
        except PackageNotFoundError:  # of another platform
            continue
        further = map(Requirement, found[name].requires or ())
        todo += [r for r in further if not r.marker or any(r.marker.evaluate({"extra": e}) for e in ("", *name[1]))]
    return found.values()


def environment(folder, extras):
    """A folder of links to the packages that the project asks for with these extras, and to no other."""
    for found in required(extras):
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            target = Path(found.locate_file(top))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)
    return folder


USES = {
    "": "from fromage import Fromage; Fromage.load(k=1, q=8); from fromage.training.module import FromageModule",
    PHOTOS: "import fromage.apps.web.demo, fromage.serving.app; import fromage.apps.photos; "
    "from fromage.models.language_model import load_lm; load_lm('gguf:tiny.gguf')",
    "quant": "from fromage.models.language_model import load_lm; load_lm('toy', quantize='nf4')",
    "lora": "from fromage import Octopus; Octopus.load(num_queries=3, decoder_width=16, heads=2, lora_rank=2)",
    "masks": "from fromage.octopus.segments import read_mask; read_mask([[0, 0, 2, 0, 2, 2]], 4, 4)",
    "evals": "from pycocoevalcap.cider.cider import Cider; from pycocoevalcap.meteor.meteor import Meteor; "
    "import eccv_caption; import fromage.evals.captioning",
}


@pytest.mark.parametrize("extras", USES)
def test_an_extra_brings_all_that_it_needs(extras, tmp_path, tmp_path_factory):
    packages = environment(tmp_path_factory.mktemp("packages"), filter(None, extras.split(",")))
    assert not (packages / "pytest").exists() and (packages / "torch").exists()
    if "gguf" in extras:
        write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(map(str, (ROOT, packages))), "OMP_NUM_THREADS": "1"}
    env |= {"FROMAGE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-S", "-c", USES[extras]]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
