"""The Lightning data module of Octopus: sources of examples, mixed, as rows with the pixels or patches of their image."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from fromage.checks import check_real, check_whole
from fromage.data.annotations import odd_allowed
from fromage.data.loader import no_loaders
from fromage.data.workers import WorkerLoader
from fromage.errors import UserError, first_few
from fromage.models.encode_files import check_lost
from fromage.octopus.collate import Collate
from fromage.octopus.dataset import GroundingDataset, collated
from fromage.octopus.examples import Example, Row, Source, rows_of
from fromage.octopus.patch_store import PatchStore
from fromage.octopus.sampler import ResumableSampler
from fromage.octopus.sources.file_source import with_masks
from fromage.octopus.step import GroundingBatch
from fromage.octopus.template import image_first

AT_ONCE = 5000  # images that one device encodes before the others wait for it; they wait half an hour at most


class OctopusData(pl.LightningDataModule):
    """The data module: examples of one or several sources, mixed."""

    def __init__(
        self,
        train: list[Source] | None = None,
        val: list[Source] | None = None,
        batch_size: int = 16,
        val_batch_size: int | None = None,
        per_image: int = 1,
        features: str | None = None,
        workers: int = 4,
        max_lost: float = 0.05,
        seed: int = 0,
    ) -> None:
        """Set the data; nothing is read yet. Raises UserError for numbers out of range.

        Args:
            train: sources of training examples, which are mixed: classes of fromage.octopus.sources, or your own.
            val: sources of validation examples.
            batch_size: rows per training step on each device: images, each with its conversations.
            val_batch_size: examples per validation step on each device; null for batch_size.
            per_image: maximum number of conversations in a row. They share their image, which is read once: the gradients
                are those of rows of one conversation each, at a fraction of the work.
            features: folder of stored patch features, written on first use; null encodes images in every step.
            workers: processes that decode images, per device.
            max_lost: maximum share (0 to 1) of missing or broken images, and of odd entries.
            seed: seed of the order of examples; the epoch is added to it.
        """
        super().__init__()
        check_whole("data.batch_size", batch_size, 1)
        check_whole("data.val_batch_size", val_batch_size or batch_size, 1)
        check_whole("data.per_image", per_image, 1)
        check_whole("data.workers", workers, 0)
        check_real("data.max_lost", max_lost, 0, 1)
        self.sources = {"train": train or [], "val": val or []}
        self.batch_size, self.val_batch_size, self.features = batch_size, val_batch_size or batch_size, features
        self.per_image, self.workers, self.max_lost, self.seed = per_image, workers, max_lost, seed
        self.examples: dict[str, list[Example]] = {}
        self.layout: dict[str, int] = {}  # what the order of the rows depends on
        self.former: dict[str, int] | None = None  # of the run that goes on

    def setup(self, stage: str) -> None:
        """Read the sources. Raises UserError for missing files and for empty training data."""
        module: Any = self.trainer and self.trainer.lightning_module
        for part, sources in self.sources.items():
            if getattr(module, "trains_masks", False):
                with_masks(sources)
            if part not in self.examples and (part == "val" or stage == "fit"):
                with odd_allowed(self.max_lost):
                    listed = [example for source in sources for example in source]
                self.examples[part] = self._present(listed)
                if part == "val":  # keys of several sources may be equal, and results are told apart by them
                    numbered = enumerate(self.examples[part])
                    self.examples[part] = [replace(example, key=f"{i}:{example.key}") for i, example in numbered]
        if stage == "fit" and not self.examples["train"]:
            raise UserError("data.train: there is no example; name sources that hold some")

    def _present(self, examples: list[Example]) -> list[Example]:
        """The examples whose image file exists. Raises UserError if too many are missing."""
        images = {example.image for example in examples}
        missing = {image for image in images if not Path(image).is_file()}
        check_lost([("missing", Path(image)) for image in sorted(missing)], len(images), self.max_lost)
        if missing:
            warnings.warn(f"{len(missing)} of {len(images)} images are missing: {first_few(sorted(missing))}", stacklevel=2)
        return [example for example in examples if example.image not in missing]

    def train_dataloader(self) -> DataLoader[Any]:
        """Full batches, in a new order each epoch."""
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """All examples in stored order; an empty list if there are none."""
        return self._loader("val", self.val_batch_size, shuffle=False) if self.examples["val"] else no_loaders()

    def transfer_batch_to_device(
        self, batch: GroundingBatch | None, device: torch.device, dataloader_idx: int
    ) -> GroundingBatch | None:
        """Move tensors and boxes to the device."""
        return batch and batch.to(device)

    def state_dict(self) -> dict[str, Any]:
        """What the order of the rows depends on; Lightning keeps it in the checkpoint."""
        return {"layout": self.layout}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The layout of the run that goes on. Its place in the epoch the sampler knows, which Lightning does not look at."""
        self.former = state_dict["layout"]
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")

    def _loader(self, part: str, batch_size: int, shuffle: bool) -> DataLoader[Any]:
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        examples = self._usable(part, module)
        store = self._store(examples, module.model.vision) if self.features else None
        if store is not None:
            examples = [example for example in examples if example.image not in store.lost]
        rows = rows_of(examples, self.per_image, self.seed) if shuffle else [[[example]] for example in examples]
        collate = Collate(module.model, store is not None, module.with_queries)
        rows = self._fitting(part, rows, collate, module.model.lm.max_length)
        if any(len(row) > 1 or len(turns) > 1 for row in rows for turns in row) and not image_first(module.model.template):
            raise UserError("model.template: the image must come first where prompts share it; or set data.per_image to 1")
        dataset = GroundingDataset(rows, module.model.vision.transform, store, self.max_lost, replace=shuffle)
        return WorkerLoader(
            dataset,
            batch_size,
            sampler=self._sampler(dataset, batch_size) if shuffle else None,
            drop_last=shuffle,
            num_workers=0 if store is not None else self.workers,
            collate_fn=partial(collated, collate),
            pin_memory=torch.cuda.is_available(),
        )

    def _usable(self, part: str, module: Any) -> list[Example]:
        """The examples that have enough object queries. Raises UserError for what the module's stage cannot learn from."""
        queries, all_of_them = module.model.num_queries, self.examples[part]
        examples = [example for example in all_of_them if not queries or len(example.meant) <= queries]
        if left := len(all_of_them) - len(examples):
            warnings.warn(f"{left} examples point at more than the {queries} object queries: left out", stacklevel=2)
        if part == "train" and module.trains_masks and not any(any(example.masks) for example in examples):
            raise UserError("model.mask_scale: no example of data.train has a mask; name files of RefCOCO, or set it to 0")
        if queries and not module.with_queries and any(example.meant for example in examples):
            raise UserError(
                f"data.{part}: some answers point at boxes, and stage 1 has no object queries yet; name captions"
            )
        return examples

    def _fitting(self, part: str, rows: list[Row], collate: Collate, longest: int | None) -> list[Row]:
        """Rows whose conversations the language model has positions for; what is too long is cut after a turn.

        Raises UserError where nothing is left.
        """
        if longest is None:
            return rows
        kept, cut = [], 0
        for row in rows:
            some = [collate.fitting(turns, longest) for turns in row]
            cut += sum(len(turns) - len(short) for turns, short in zip(row, some, strict=True))
            if left := [turns for turns in some if turns]:
                kept.append(left)
        if rows and not kept:
            raise UserError(
                f"data.{part}: every example is longer than the {longest} tokens of the language model; shorten them"
            )
        if cut:
            warnings.warn(f"{cut} turns end beyond the {longest} tokens of the language model: left out", stacklevel=2)
        return kept

    def _sampler(self, dataset: GroundingDataset, batch_size: int) -> ResumableSampler:
        """The order of the rows in training. Raises UserError where a device has less than a batch of them."""
        rows, devices = dataset.rows, self.trainer.world_size  # type: ignore[union-attr]
        if len(rows) // devices < batch_size:
            each = f" on each of {devices} devices" * (devices > 1)
            told = f"{len(rows)} rows of training examples are fewer than data.batch_size {batch_size}{each}"
            raise UserError(f"{told}: lower it")
        self.layout = {"rows": len(rows), "data.batch_size": batch_size, "data.per_image": self.per_image}
        self.layout |= {"data.seed": self.seed, "trainer.devices": devices}
        return ResumableSampler(dataset, self.trainer, self.seed, self._seen)

    def _seen(self) -> int:
        """Rows of this epoch that were trained on before the run was stopped, on each device; Lightning counts batches.

        Raises UserError where the order of the rows was another then.
        """
        loop: Any = self.trainer.fit_loop  # type: ignore[union-attr]
        seen = loop.epoch_loop.batch_progress
        batches: int = seen.current.ready if loop.restarting and not seen.is_last_batch else 0
        if batches and self.former and self.former != self.layout:
            name = next(name for name in self.layout if self.former.get(name) != self.layout[name])
            told = f"{name} {self.former.get(name)} (now {self.layout[name]})"
            raise UserError(f"the checkpoint is from the middle of an epoch with {told}: set that back to go on exactly")
        return batches * self.batch_size

    def _store(self, examples: Sequence[Example], vision: Any) -> PatchStore:
        """The patches of all images; one process writes them while the others wait."""
        folder, images = Path(self.features or ""), list(dict.fromkeys(example.image for example in examples))
        trainer: Any = self.trainer
        at_once = len(images) if trainer.world_size == 1 else AT_ONCE
        for start in range(0, len(images), at_once):
            if trainer.is_global_zero:
                PatchStore(folder, vision).add(images[start : start + at_once], workers=self.workers)
            trainer.strategy.barrier("patches")
        store = PatchStore(folder, vision)
        lost = [(cause, Path(image)) for image, cause in store.lost.items() if image in set(images)]
        check_lost(lost, len(images), self.max_lost)
        return store
