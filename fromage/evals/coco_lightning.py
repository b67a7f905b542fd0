"""The evaluation on COCO as a test run of Lightning: `lightning test --config coco_val.yaml --ckpt_path CHECKPOINT`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from fromage.data.annotations import odd_allowed
from fromage.errors import UserError
from fromage.evals.caption_sets import read_caption_set
from fromage.evals.coco import evaluate
from fromage.evals.options import Options
from fromage.training.module import FromageModule


class CocoModule(FromageModule):
    """FROMAGe, whose test is fromage.evals.coco: recalls both ways with all captions of an image, logged as test/..."""

    def on_test_epoch_start(self) -> None:
        """Raise UserError on several devices."""
        if self.trainer.world_size > 1:
            raise UserError("the evaluation on COCO runs on one device: give --trainer.devices 1")

    def test_step(self, batch: int, index: int) -> None:  # type: ignore[override]
        """The whole evaluation, without CLIP. Raises UserError where too many images are lost."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        report = evaluate(self.model, data.captions, data.options)
        named = {f"test/{at}_{name}": value for at, found in report["fromage"].items() for name, value in found.items()}
        lost = len(data.captions.images) - report["gallery"]
        self.log_dict(named | {"test/gallery": float(report["gallery"]), "test/images_lost": float(lost)}, batch_size=1)

    def on_test_epoch_end(self) -> None:
        """Nothing is left: the step has logged everything."""


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
            batch_size: Images, or captions, in a pass.
            workers: Processes that decode images.
            max_lost: Share (0 to 1) of the images that may be missing or broken, and of entries that may be odd.
            limit: Images at most; null for all.
        """
        super().__init__()
        self.annotations, self.images, self.split, self.limit = Path(annotations), Path(images), split, limit
        self.options = Options(batch_size, workers, max_lost, clip=False)

    def setup(self, stage: str) -> None:
        """Read the captions, before the towers are loaded. Raises UserError as read_caption_set does."""
        with odd_allowed(self.options.max_lost):
            self.captions = read_caption_set(self.annotations, self.images, "coco", self.split, self.limit)

    def test_dataloader(self) -> list[int]:
        """One step, in which the module evaluates everything."""
        return [0]
