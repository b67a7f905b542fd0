"""Stored features: run the frozen vision tower once over shards, and train from what it said.

The tower is frozen and images are not augmented, so its pooled features v(x) in R^m never change: a run that reads them
needs neither images nor tower. Stored shards have the names of those they were made from; KEY.npy stands in place of
KEY.jpg (or beside it), and features.json names the tower. Of a tuple (fromage.data.tuples) KEY.target.npy stands in place of
KEY.target.jpg, its second image.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from fromage.data.broken import Broken
from fromage.data.feature_chunks import Chunk, ChunkStream
from fromage.data.sample_images import TARGET_IMAGE, to_npy
from fromage.data.shard_names import expand, shard_name
from fromage.data.shard_sizes import read_sizes, total
from fromage.data.shard_streams import is_remote, read_remote_json
from fromage.data.shard_writer import ShardWriter
from fromage.data.shards import Raw, first_sample
from fromage.data.workers import WorkerLoader, usual_workers
from fromage.errors import UserError
from fromage.identity import FolderKind
from fromage.images.transforms import JpegDecoding, decoding_as
from fromage.io import read_json, write_json
from fromage.locks import held

if TYPE_CHECKING:
    from fromage.models.vision.base import VisionTower

LOST = "broken.json"  # what of each stored shard could not be used
COUNTS = ("bad", "lost", "missing", "unread")  # of Broken, as LOST has them
FEATURES = FolderKind(
    "features.json",
    "features",
    of="tower",
    remedy="load that tower, or store the features in another folder",
    again="store the features again",
    ignored=frozenset({"source", "keep_images"}),  # for those who read them; see store_features
    foreign="*.tar",
)


def store_features(
    shards: str | list[str],
    out: Path,
    vision: VisionTower,
    batch_size: int = 256,
    keep_images: bool = False,
    workers: int | None = None,
    max_broken: float = 0.05,
    decoding: JpegDecoding = "draft",
) -> int:
    """Encode the images of shards (a pattern, see expand) and write shards of features; returns how many were encoded.

    Each KEY.npy is a vector (m,) in the tower's dtype, bfloat16 as the uint16 of its bits. A run that was interrupted is
    taken up by the next call: a shard that is finished is not done again. One whose reading broke off is stored as far as
    it was read, and done again. workers: processes that read; None: usual_workers. decoding: as of
    fromage.data.datamodule.CC3M.

    Raises:
        UserError: out holds the features of another tower or other shards, another process writes it, two shards share a
            name, the disk is full, or more than max_broken of the samples are broken.
    """
    sources = expand(shards)
    _check_names(sources)
    with held(out):
        todo = _to_do(sources, out, vision.fingerprint(decoding) | {"keep_images": keep_images})
        broken = _so_far(out, {shard_name(s) for s in sources} - {shard_name(s) for s in todo}, max_broken)
        stream = ChunkStream(todo, decoding_as(vision.transform, decoding), batch_size)
        reading = usual_workers() if workers is None else workers
        loader = WorkerLoader(stream, None, num_workers=min(reading, len(todo)))
        with tqdm(total=total(stream.shards), desc="features", unit=" images") as bar:
            encoded = _store(loader, out, vision, keep_images, broken, bar)
        broken.check(end=True)
        return encoded


def _to_do(sources: list[str], out: Path, tower: dict[str, Any]) -> list[str]:
    """The shards whose features are not there yet. Raises UserError where those that are there are of other shards."""
    of = _folders(sources)
    there = FEATURES.begin(out, tower | {"source": of})
    done = _done(sources, out, of, there.get("source", of))
    if there.get("keep_images", tower["keep_images"]) != tower["keep_images"]:
        if done:
            told = "with" if there["keep_images"] else "without"
            raise UserError(f"{out}: holds features {told} their images; name another folder, or give --keep-images as then")
        write_json(out / FEATURES.file, there | {"keep_images": tower["keep_images"]})
    return [s for s in sources if s not in done]


def _so_far(out: Path, done: set[str], limit: float) -> Broken:
    """What is broken of the shards that are finished, by their names."""
    sizes, said = read_sizes(out), _lost(out)
    broken = Broken(limit)
    for name in done:
        broken.good += sizes.get(name, 0)
        for count, number in zip(COUNTS, said.get(name, ()), strict=False):  # former versions have no `unread`
            setattr(broken, count, getattr(broken, count) + number)
    return broken


def _lost(out: Path) -> dict[str, list[int]]:
    """By the name of a stored shard: the COUNTS of what of it is broken."""
    return read_json(out / LOST, LOST) if (out / LOST).exists() else {}  # type: ignore[no-any-return]


def _folders(sources: list[str]) -> list[str]:
    return sorted({*map(_folder, sources)})


def _folder(shard: str) -> str:
    return shard.rpartition("/")[0] if is_remote(shard) else str(Path(shard).absolute().parent)


def _done(sources: list[str], out: Path, of: list[str], there: Any) -> list[str]:
    """The shards whose features are in a folder, which says that they are of the folders `there`. Raises as _to_do does."""
    sizes, unread = read_sizes(out), {name for name, counts in _lost(out).items() if any(counts[COUNTS.index("unread") :])}
    stored = [s for s in sources if shard_name(s) in sizes and (out / shard_name(s)).is_file()]
    if stored and there != of:
        differs = f"{shard_name(stored[0])} there is of {', '.join(map(str, there))}, here of {', '.join(of)}"
        moved = f"where shards have only moved, correct source in {FEATURES.file}"
        raise UserError(f"{out}: holds features of other shards ({differs}); name another folder; {moved}")
    done = [s for s in stored if shard_name(s) not in unread]
    for source in done:
        made = out / shard_name(source)
        if not is_remote(source) and Path(source).is_file() and Path(source).stat().st_mtime > made.stat().st_mtime:
            told = f"remove {made} to encode it again, or touch it where the shard has only been copied"
            raise UserError(f"{source}: is newer than its features; {told}")
    return done


def check_source(shards: str | list[str], out: Path) -> None:
    """Raise UserError for shards that cannot be had, and where out holds the features of others; no tower is needed."""
    sources = expand(shards)
    _check_names(sources)
    if (out / FEATURES.file).exists():
        _done(sources, out, of := _folders(sources), FEATURES.read(out).get("source", of))


def _store(chunks: Iterable[Chunk], out: Path, vision: VisionTower, keep_images: bool, broken: Broken, bar: tqdm) -> int:
    """Write shards of features from chunks of shards, as they come; returns how many samples there are.

    broken: counts those of all workers together, so that the verdict does not depend on how many there are.
    """
    begun: dict[str, StoredShard] = {}  # the shards that workers are at, by file name
    encoded = 0
    try:
        for chunk in chunks:
            name = shard_name(chunk.shard)
            if name not in begun:
                begun[name] = StoredShard(out / name)
            if chunk.broken is None:
                begun[name].add(chunk, vision, keep_images)
                bar.update(len(chunk.samples))
            else:
                (out / name).unlink(missing_ok=True)  # one that broke off, to which the new counts would not belong
                counts, known = [getattr(chunk.broken, count) for count in COUNTS], _lost(out)
                if any(counts) or name in known:  # of a shard that was mended since
                    write_json(out / LOST, known | {name: counts})
                encoded += begun[name].close()
                broken.join(chunk.broken)
                del begun[name]
        return encoded
    finally:
        for shard in begun.values():
            shard.discard()


class StoredShard:
    """A shard of features that is being written, from the chunks of one shard."""

    def __init__(self, path: Path) -> None:
        self.writer = ShardWriter(path, "shards that are finished are kept, and the same command goes on")
        self.rows: list[Tensor] = []  # (m,) of each image so far

    def add(self, chunk: Chunk, vision: VisionTower, keep_images: bool) -> None:
        """Encode the images that are new in a chunk, and write its samples."""
        if chunk.pixels is not None:
            self.rows += _encode(vision, chunk.pixels)  # (n, m)
        for raw, images in zip(chunk.samples, chunk.images, strict=True):
            named = zip(("npy", f"{TARGET_IMAGE}npy"), (to_npy(self.rows[i]) for i in images), strict=False)
            self.writer.write(raw["__key__"], _members(raw, keep_images) | dict(named))

    def close(self) -> int:
        """Finish the shard and give it its name; returns how many samples it holds."""
        self.writer.close()
        return len(self.writer.keys)

    def discard(self) -> None:
        """Drop a shard that was not closed."""
        self.writer.discard()


def check_features(shards: str | list[str], vision: VisionTower, decoding: JpegDecoding = "draft") -> None:
    """Raise UserError where features in any of the shards are not those this tower, preprocessing included, gives.

    features.json beside the shards says of which tower they are, also at a URL. A warning tells of features without it.
    """
    unnamed = []
    for folder, shard in {_folder(shard): shard for shard in expand(shards)}.items():
        if (there := _about(folder, shard)) is not None:
            FEATURES.compare(folder, there, vision.fingerprint(decoding))
        else:
            unnamed.append(shard)
    if (first := next((shard for shard in unnamed if "npy" in first_sample(shard)), None)) is not None:
        told = f"no {FEATURES.file} beside these stored features says of which tower they are"
        warnings.warn(f"{shard_name(first)}: {told}; see that it is the model's", stacklevel=2)


def _about(folder: str, shard: str) -> dict[str, Any] | None:
    """What features.json beside a shard says; None where it cannot be had."""
    if not is_remote(shard):
        return FEATURES.read(Path(folder)) if (Path(folder) / FEATURES.file).exists() else None
    if shard.startswith("pipe:") or "?" in shard:
        return None
    try:
        found = read_remote_json(f"{folder}/{FEATURES.file}")
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _check_names(shards: list[str]) -> None:
    """Raise UserError where two shards would be stored under one name."""
    twice = [name for name, n in Counter(map(shard_name, shards)).items() if n > 1]
    if twice:
        raise UserError(f"several shards are called {twice[0]}: store each folder's features in a folder of its own")


def _members(raw: Raw, keep_images: bool) -> dict[str, bytes]:
    """What a stored sample keeps of its source: captions, meta and, if asked, the image."""
    return {k: v for k, v in raw.items() if not k.startswith("__") and (keep_images or k in ("txt", "json"))}


@torch.inference_mode()
def _encode(vision: VisionTower, pixels: Tensor) -> Tensor:
    """(b, 3, H, W) -> (b, m) on the CPU."""
    device = next(vision.parameters()).device
    features = vision(pixels.to(device)).to("cpu", vision.dtype)
    if len(features) and not features.isfinite().any():
        raise UserError(
            f"vision tower {vision.name}: its features are not finite; its weights are damaged, fetch them again"
        )
    return features
