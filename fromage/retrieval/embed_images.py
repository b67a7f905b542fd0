"""Embedding images: N of them become rows of width q in the shared retrieval space, stored part by part."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fromage.checkpoints.format import CONFIG
from fromage.checkpoints.run_folder import last_checkpoint
from fromage.checks import check_whole
from fromage.data.features import check_features
from fromage.data.image_source import ImageBatch, ImageSample, ImageSource, find_images, is_shards
from fromage.data.shard_names import expand
from fromage.data.workers import WorkerLoader
from fromage.errors import UserError, first_few
from fromage.locks import held
from fromage.retrieval.embedding_store import DTYPES, EmbeddingStore
from fromage.retrieval.rerank import has_direction

if TYPE_CHECKING:
    from fromage.models.fromage import Fromage
    from fromage.retrieval.embed_ray import ImageSide, RayJob

UNSOUND = "its embedding is zero, infinite or NaN"


def embed_images(
    model: Fromage,
    source: str | Path,
    out: str | Path,
    *,
    batch_size: int = 64,
    workers: int = 0,
    captions: str | Path | None = None,
    checkpoint: str | Path | None = None,
    dtype: str = "float32",
    ray: RayJob | None = None,
) -> EmbeddingStore:
    """Embed a folder of images or webdataset shards into the folder out: unit rows, in the order of the names.

    A run that was killed is taken up by the next call; what it loses is the parts it was at: a shard, or some thousand
    files, per worker. So is a source that has grown: what is new comes after, and parts of which a file has changed or
    gone are embedded again. Shards may hold stored features (npy) in place of images. What is broken is left out with a
    warning. Raises UserError if nothing is left, if out holds the embeddings of another model or source, and where another
    process is writing it.

    Args:
        model: both towers on the device to be used.
        source: a folder searched to its depth, a .tar, a folder of these, or a pattern as webdataset expands it.
        batch_size: images per step.
        workers: processes that decode; 0 decodes in this one.
        captions: for a folder of images, a JSON file of {file: caption} or COCO's.
        checkpoint: where the model was loaded from, so that open_index finds it.
        dtype: of the stored rows, float32 or float16.
        ray: do it as a Ray Data job; the model is then on the CPU, and workers does not count.
    """
    check_whole("batch_size", batch_size, 1)
    check_whole("workers", workers, 0)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: embeddings are stored as {' or '.join(DTYPES)}")
    said = None if captions is None else Path(captions)
    images = find_images(str(source), model.vision.transform, said, batch_size)
    if is_shards(Path(source)):
        check_features(expand(str(source)), model.vision)
    with held(out):
        store = embed_source(model, images, out, workers=workers, checkpoint=checkpoint, dtype=dtype, ray=ray)
        good, broken = len(store), store.broken()
        if not good:
            store.discard()  # or the next run would find all done
    if not good:
        with suppress(OSError):  # what else is there stays
            Path(out).rmdir()
    _report(good, broken, source)
    return store


def embed_source(
    model: Fromage,
    images: ImageSource,
    out: str | Path,
    *,
    workers: int = 0,
    checkpoint: str | Path | None = None,
    dtype: str = "float32",
    ray: RayJob | None = None,
) -> EmbeddingStore:
    """As embed_images, but what is left out is not reported, and nothing may be left."""
    of = {
        "fingerprint": model.fingerprint(),
        "checkpoint": absolute_checkpoint(checkpoint),
        "width": model.q,
        "dtype": dtype,
    }
    store, left = EmbeddingStore.begin_for(out, images, **of)
    _fill(store, ray.embed(model, left) if ray else _here(model, left, workers), left)
    return store


class Done(NamedTuple):
    """An embedded chunk."""

    part: int
    number: int
    rows: list[np.ndarray]  # (n, q) in all
    good: list[ImageSample]  # those of the rows
    broken: list[str]
    last: bool
    stamps: dict[str, str]  # as of ImageBatch


def embed_chunk(model: Fromage | ImageSide, chunk: ImageBatch) -> Done:
    """Embed the images of a chunk."""
    done = Done(chunk.part, chunk.number, [], [], [], chunk.last, chunk.stamps)
    for tensor, samples in chunk.groups:
        if tensor is None:
            done.broken.extend(sample.problem for sample in samples)
        elif tensor.ndim == 2 and tensor.shape[1] != model.vision.width:
            told = f"features {tensor.shape[1]} wide, not {model.vision.width} as the vision tower's"
            done.broken.extend(f"{sample.item.path}: {told}" for sample in samples)
        else:
            rows = _embed(model, tensor)  # (n, q)
            sound = has_direction(rows)  # (n,)
            done.rows.append(rows[sound])
            done.good.extend(compress(samples, sound))
            done.broken.extend(f"{sample.item.path}: {UNSOUND}" for sample in compress(samples, ~sound))
    return done


def _here(model: Fromage, images: ImageSource, workers: int) -> Iterator[Done]:
    """Embed the parts to do in this process."""
    loader = WorkerLoader(images, None, num_workers=min(workers, len(images.todo)))
    return (embed_chunk(model, chunk) for chunk in loader)


def _fill(store: EmbeddingStore, chunks: Iterable[Done], images: ImageSource) -> None:
    """Store what is embedded, part by part, in whatever order it comes."""
    parts: dict[int, dict[int, Done]] = {}  # those that are not whole yet
    done = len(store) + len(store.broken())
    with tqdm(desc="embedding", total=images.count, initial=done, unit=" images") as bar:
        try:
            for chunk in chunks:
                part = parts.setdefault(chunk.part, {})
                part[chunk.number] = chunk
                bar.update(len(chunk.good) + len(chunk.broken))
                if any(chunk.last and chunk.number + 1 == len(part) for chunk in part.values()):
                    _write(store, chunk.part, [part[number] for number in sorted(part)])
                    del parts[chunk.part]
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on where it was") from None


def _write(store: EmbeddingStore, number: int, chunks: Sequence[Done]) -> None:
    """Store a part, its rows in the order of the source."""
    good = [sample for chunk in chunks for sample in chunk.good]
    order = sorted(range(len(good)), key=lambda i: good[i].place)
    # (n, q)
    rows = np.concatenate([np.empty((0, store.about["width"]), np.float32), *(rows for c in chunks for rows in c.rows)])
    items = [good[i].item for i in order]
    broken = [line for chunk in chunks for line in chunk.broken]
    store.write(number, rows[order], items, broken, chunks[-1].stamps)


@torch.no_grad()
def _embed(model: Fromage | ImageSide, tensor: Tensor) -> np.ndarray:
    """Pixels (B, 3, H, W) or stored features (B, m) -> rows (B, q)."""
    features = model.vision(tensor.to(model.device)) if tensor.ndim == 4 else tensor.to(model.device)  # (B, m)
    return model.embed_images(features).float().cpu().numpy()


def _report(good: int, broken: list[str], source: str | Path) -> None:
    """Warn of what is left out. Raises UserError where nothing is left."""
    some = first_few(broken, "; ")
    if not good and broken and all(line.endswith(UNSOUND) for line in broken):
        raise UserError(f"{source}: every embedding is zero, infinite or NaN; embed it with a sound checkpoint")
    if not good:
        raise UserError(f"{source}: no usable image is there. {some}")
    if broken:
        warnings.warn(f"{source}: {len(broken)} of {good + len(broken)} images are left out: {some}", stacklevel=3)


def absolute_checkpoint(checkpoint: str | Path | None) -> str:
    """A checkpoint's place for later: an absolute path, of a run's folder the file, or a name on the hub as it is."""
    if not checkpoint or not Path(checkpoint).exists():
        return str(checkpoint or "")
    file = None if (Path(checkpoint) / CONFIG).exists() else last_checkpoint(Path(checkpoint))
    return str((file or Path(checkpoint)).absolute())
