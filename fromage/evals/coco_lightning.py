"""The evaluation on COCO as a test run of Lightning: `lightning test --config coco_val.yaml --ckpt_path CHECKPOINT`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fromage.data.workers import init_worker
from fromage.errors import UserError
from fromage.evals.caption_sets import CaptionSet, read_captions
from fromage.evals.coco import both_ways
from fromage.retrieval.encode import Files, check_lost
from fromage.training.module import FromageModule

Item = tuple[Path, list[str], Any]  # an image's file, its captions, and its pixels (3, H, W) or why there are none


class Captioned(Files):
    """Images with their captions."""

    def __init__(self, data: CaptionSet, transform: Any) -> None:
        super().__init__(data.images, transform)
        self.captions = data.captions

    def __getitem__(self, number: int) -> Item:  # type: ignore[override]
        return self.paths[number], self.captions[number], super().__getitem__(number)


class CocoModule(FromageModule):
    """FROMAGe, whose test is fromage.evals.coco: recalls both ways with all captions of an image, logged as test/..."""

    def on_test_epoch_start(self) -> None:
        """Forget the last test."""
        if self.trainer.world_size > 1:
            raise UserError("the evaluation on COCO runs on one device: give --trainer.devices 1")
        self._tested: list[tuple[Tensor, Tensor, list[int]]] = []
        self._lost: list[tuple[str, Path]] = []

    def test_step(self, batch: list[Item], index: int) -> None:  # type: ignore[override]
        """Embed images and their captions; both are kept for the end."""
        self._lost += [(cause, path) for path, _, cause in batch if isinstance(cause, str)]
        good = [(said, pixels) for _, said, pixels in batch if isinstance(pixels, Tensor)]
        if good:
            texts = self.model.embed_text([text for said, _ in good for text in said])  # (captions, q)
            images = self.model.embed_images(self.model.vision(torch.stack([pixels for _, pixels in good])))  # (b, q)
            self._tested.append((texts, images, [len(said) for said, _ in good]))

    def on_test_epoch_end(self) -> None:
        """Recalls and median ranks over everything. Raises UserError where too many images were lost."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        check_lost(self._lost, len(data.data.images), data.max_lost)
        texts, images = (torch.cat(rows) for rows in list(zip(*self._tested, strict=True))[:2])
        counts = torch.tensor([n for _, _, some in self._tested for n in some], device=images.device)
        owner = torch.arange(len(images), device=images.device).repeat_interleave(counts)  # (captions,)
        system = both_ways(texts, images, owner)
        named = {f"test/{at}_{name}": value for at, figures in system.items() for name, value in figures.items()}
        self.log_dict(named | {"test/gallery": float(len(images)), "test/images_lost": float(len(self._lost))})


class CocoCaptions(pl.LightningDataModule):
    """COCO's images with their captions, to be tested on."""

    def __init__(
        self,
        annotations: str,
        images: str,
        split: str = "test",
        batch_size: int = 64,
        workers: int = 4,
        max_lost: float = 0.05,
        limit: int | None = None,
    ) -> None:
        """Name the data; nothing is read yet.

        Args:
            annotations: captions_val2017.json, or dataset_coco.json of Karpathy's splits.
            images: Folder of the images.
            split: Of Karpathy's splits: train, val or test.
            batch_size: Images in a pass; each has five captions.
            workers: Processes that decode images.
            max_lost: Share (0 to 1) of the images that may be missing or broken.
            limit: Images at most; null for all.
        """
        super().__init__()
        self.annotations, self.images, self.split, self.limit = Path(annotations), Path(images), split, limit
        self.batch_size, self.workers, self.max_lost = batch_size, workers, max_lost

    def setup(self, stage: str) -> None:
        """Read the captions, before the towers are loaded. Raises UserError as read_captions does."""
        self.data: CaptionSet = read_captions(self.annotations, self.images, "coco", self.split, self.limit)

    def test_dataloader(self) -> DataLoader[Any]:
        """All images once, in the order of the file. Raises UserError where too many are missing."""
        missing = [("missing", path) for path in self.data.images if not path.is_file()]
        check_lost(missing, len(self.data.images), self.max_lost)
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        pairs = Captioned(self.data, module.model.vision.transform)
        return DataLoader(pairs, self.batch_size, num_workers=self.workers, collate_fn=list, worker_init_fn=init_worker)
