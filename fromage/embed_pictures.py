"""Embedding pictures: N of them, as rows of width q in the shared retrieval space."""

from __future__ import annotations

import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fromage.errors import UserError
from fromage.features import check_features
from fromage.model import Fromage
from fromage.picture_source import Item, Sample, collate, find_pictures


def embed_pictures(
    model: Fromage, source: str | Path, batch_size: int = 64, workers: int = 0, captions: str | Path | None = None
) -> tuple[np.ndarray, list[Item]]:
    """Embed a folder of pictures or webdataset shards: (N, q) unit rows and their items, in the order of the names.

    Shards may hold stored features (npy) in place of pictures. What is broken is left out with a warning. Raises UserError
    if nothing is left.

    Args:
        model: both towers on the device to be used.
        source: a folder searched to its depth, a .tar, a folder of these, or a pattern as webdataset expands it.
        batch_size: pictures per step.
        workers: processes that decode; 0 decodes in this one.
        captions: for a folder of pictures, a JSON file of {file: caption} or COCO's.
    """
    pictures = find_pictures(str(source), model.vision.transform, None if captions is None else Path(captions))
    if shards := [part for part in pictures.parts if ".tar" in part]:
        check_features(shards, model.vision)
    loader = DataLoader(pictures, batch_size, num_workers=workers, collate_fn=collate)
    rows: list[np.ndarray] = []
    good: list[Sample] = []
    broken: list[Sample] = []
    with tqdm(desc="embedding", total=pictures.count, unit=" pictures") as bar:
        for tensor, samples in chain.from_iterable(loader):
            (broken if tensor is None else good).extend(samples)
            if tensor is not None:
                rows.append(_embed(model, tensor))
            bar.update(len(samples))
    _report(broken, len(good), source)
    order = sorted(range(len(good)), key=lambda i: good[i].order)
    return np.concatenate(rows)[order], [good[i].item for i in order]


@torch.no_grad()
def _embed(model: Fromage, tensor: Tensor) -> np.ndarray:
    """Pixels (B, 3, H, W) or stored features (B, m) -> rows (B, q)."""
    if tensor.ndim == 2 and tensor.shape[1] != model.vision.width:
        raise UserError(f"the stored features are {tensor.shape[1]} wide, not {model.vision.width}; use their image tower")
    features = model.vision(tensor.to(model.device)) if tensor.ndim == 4 else tensor.to(model.device)  # (B, m)
    return model.embed_images(features).float().cpu().numpy()


def _report(broken: list[Sample], good: int, source: str | Path) -> None:
    some = "; ".join(sample.problem for sample in broken[:5]) + ("; ..." if len(broken) > 5 else "")
    if not good:
        raise UserError(f"{source}: no usable picture is there. {some}")
    if broken:
        warnings.warn(f"{source}: {len(broken)} of {good + len(broken)} pictures are left out: {some}", stacklevel=3)
