"""The data module of FROMAGe: shards of images (or stored features) and captions -> batches.

In training, shards are divided among devices and workers, in a new order each epoch. In validation whole batches are
divided, so every sample comes exactly once, in stored order, for any number of devices and workers. Exact resume is in
fromage.data.loader.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import webdataset as wds

from fromage.checks import check_real, check_whole
from fromage.data.batches import SamplePreprocessor
from fromage.data.features import check_features
from fromage.data.loader import BatchIterable, Loader, TrainLoader, WithTuples, no_loaders
from fromage.data.sample_images import ImageReader
from fromage.data.shard_names import expand
from fromage.data.streams import Decoder, TrainStream, ValidationStream
from fromage.data.tuples import TuplePreprocessor
from fromage.errors import UserError
from fromage.images.transforms import JpegDecoding, Transform, decoding_as

if TYPE_CHECKING:
    from fromage.data.tokenizer import PromptTokenizer


class CC3M(pl.LightningDataModule):
    """Pairs of image and caption in webdataset shards: CC3M (paper, section 4), or any other such shards.

    An image with several captions is one sample. Training draws one of them in each epoch, by seed, epoch and key: within
    n epochs each of n captions comes once. In validation each caption searches for its image.
    Shards can also hold stored features (fromage.data.features): a member npy in place of the image. Tuples for composition
    learning (fromage.data.tuples) have shards of their own; each training step then has a batch of pairs and one of tuples.
    """

    def __init__(
        self,
        train_shards: str | list[str],
        val_shards: str | list[str] | None = None,
        batch_size: int = 180,
        val_batch_size: int | None = None,
        max_tokens: int = 24,
        workers: int = 4,
        shuffle: int = 10000,
        max_broken: float = 0.05,
        seed: int = 0,
        samples_per_epoch: int | None = None,
        exact_resume: bool = True,
        decoding: JpegDecoding = "draft",
        captions_per_image: int | None = None,
        requests: float = 0.0,
        train_tuples: str | list[str] | None = None,
        tuple_batch_size: int | None = None,
        tuple_shuffle: int | None = None,
        target_images: bool = True,
    ) -> None:
        """Set the data; nothing is read yet. Raises UserError for numbers out of range.

        Args:
            train_shards: Training shards: a folder, a pattern with braces (cc3m/{00000..00331}.tar), a glob, a URL, or a
                list of these.
            val_shards: Validation shards, in the same forms; null for none.
            batch_size: Pairs per training step on each device.
            val_batch_size: Pairs per validation step on each device; null for batch_size.
            max_tokens: Maximum caption length in tokens, start token and all [RET] included; [RET] is kept by truncation.
            workers: Processes that decode images, per device; 0 decodes in the training process.
            shuffle: Size of the shuffle buffer in pairs per worker, kept undecoded; 0 keeps the stored order.
            max_broken: Maximum share (0 to 1) of broken samples; above it a worker stops the run.
            seed: Seed of the order of shards and pairs; the epoch is added to it.
            samples_per_epoch: Training pairs per epoch over all devices; null for the number in the shards.
            exact_resume: Refuse a checkpoint from the middle of an epoch if the data was divided differently (shards, batch
                size, shuffle, seed, workers or devices); false starts such an epoch again.
            decoding: How JPEGs are decoded: draft decodes a large one at 1/2, 1/4 or 1/8 of its size, if that is at least
                twice the size it is resized to; exact never does. Evaluation and index always use draft.
            captions_per_image: Captions of an image that are used, the first ones; null for all. 1 draws none.
            requests: Share (0 to 1) of the training captions that the retrieval pass reads framed as a request, such as
                "Show me: CAPTION [RET]" (fromage.data.requests), so that [RET] also follows what a person asks with. A new
                draw for each caption and epoch, by seed, epoch and key; the request counts in max_tokens. Captioning reads
                the caption alone, and validation and evaluation do throughout. 0 is the paper's training.
            train_tuples: Training shards of tuples, in the same forms; null for none. An epoch goes through them as often as
                through the pairs takes.
            tuple_batch_size: Tuples per training step on each device; null for batch_size.
            tuple_shuffle: Size of the shuffle buffer in tuples per worker; null for shuffle. Where the tuples of an image
                follow one another, a small one leaves several in a batch, each other's negatives.
            target_images: Whether the target images of tuples are read; false leaves what is asked for to their captions.
        """
        super().__init__()
        if captions_per_image is not None:
            check_whole("data.captions_per_image", captions_per_image, 1)
        check_whole("data.batch_size", batch_size, 1)
        check_whole("data.val_batch_size", batch_size if val_batch_size is None else val_batch_size, 1)
        check_whole("data.tuple_batch_size", batch_size if tuple_batch_size is None else tuple_batch_size, 1)
        check_whole("data.workers", workers, 0)
        check_whole("data.shuffle", shuffle, 0)
        check_whole("data.tuple_shuffle", shuffle if tuple_shuffle is None else tuple_shuffle, 0)
        check_whole("data.samples_per_epoch", 1 if samples_per_epoch is None else samples_per_epoch, 1)
        check_real("data.max_broken", max_broken, 0, 1)
        check_real("data.requests", requests, 0, 1)
        self.train_shards, self.val_shards = train_shards, val_shards
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.max_tokens, self.workers, self.shuffle, self.max_broken = max_tokens, workers, shuffle, max_broken
        self.seed, self.samples_per_epoch, self.exact_resume, self.decoding = seed, samples_per_epoch, exact_resume, decoding
        self.captions_per_image, self.requests = captions_per_image, requests
        self.train_tuples, self.tuple_batch_size = train_tuples, tuple_batch_size or batch_size
        self.tuple_shuffle, self.target_images = shuffle if tuple_shuffle is None else tuple_shuffle, target_images
        self.transform: Transform | None = None
        self.tokenizer: PromptTokenizer | None = None

    def attach(self, transform: Transform, tokenizer: PromptTokenizer) -> None:
        """Set transform and tokenizer (overrides those of the trainer's model)."""
        self.transform, self.tokenizer = transform, tokenizer

    def setup(self, stage: str) -> None:
        """Check that the shards exist, before the towers are loaded. Raises UserError for missing shards."""
        training = (self.train_shards, self.train_tuples) if stage == "fit" else ()
        for urls in (*training, self.val_shards):
            if urls is not None:
                expand(urls)

    def train_dataloader(self) -> TrainLoader | WithTuples:
        """Shuffled full batches; see TrainStream. Raises UserError for missing shards."""
        pairs = self._train_loader(self.train_shards, self._decode(), self.batch_size, self.samples_per_epoch, self.shuffle)
        if self.train_tuples is None:
            return pairs
        batches, (_, world) = pairs.dataset.batches, self._rank()
        if batches is None:
            raise UserError("data.train_tuples: needs epochs of known length: give data.samples_per_epoch, or a sizes.json")
        count, size = batches * self.tuple_batch_size * world, self.tuple_batch_size
        tuples = self._train_loader(self.train_tuples, self._decode_tuple(), size, count, self.tuple_shuffle)
        return WithTuples(pairs, tuples)

    def _train_loader(
        self, urls: str | list[str], decode: Decoder, batch_size: int, samples: int | None, shuffle: int
    ) -> TrainLoader:
        """samples: per epoch, over all devices; None for those in the shards."""
        shards, (rank, world) = self._shards(urls), self._rank()
        how: dict[str, Any] = {"shuffle": shuffle, "seed": self.seed, "samples_per_epoch": samples}
        stream = TrainStream(shards, decode, batch_size, self.max_broken, rank, world, **how)
        loop: Any = self.trainer.fit_loop if self.trainer else None
        epoch = loop.epoch_progress.current.processed if loop else 0  # one more than `completed` after an epoch's end
        return TrainLoader(stream, min(self.workers, len(shards) // world), epoch, self.exact_resume, loop)

    def val_dataloader(self) -> Loader | list[Loader]:
        """All samples once, in order; see ValidationStream. An empty list if there are no validation shards."""
        if self.val_shards is None:
            return no_loaders()
        shards = self._shards(self.val_shards)
        stream = ValidationStream(shards, self._decode(), self.val_batch_size, self.max_broken, *self._rank())
        return Loader(stream, self.workers if stream.batches is None else min(self.workers, stream.batches))

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> BatchIterable:
        """The validation samples. Not a DataLoader, since Lightning would replace its sampler.

        Raises UserError without validation shards.
        """
        if self.val_shards is None:
            raise UserError("data.val_shards: is null, and these are what is predicted; name shards")
        return BatchIterable(self.val_dataloader())  # type: ignore[arg-type]

    def _shards(self, urls: str | list[str]) -> list[str]:
        """Expand patterns; check that stored features are of the model's vision tower."""
        shards, model = expand(urls), self._model()
        if model is not None:
            check_features(shards, model.vision, self.decoding)
        return shards

    def _model(self) -> Any:
        return getattr(getattr(self.trainer, "lightning_module", None), "model", None)

    def _rank(self) -> tuple[int, int]:
        """Rank and world size, from the trainer or else from the environment."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else wds.utils.pytorch_worker_info()[:2]

    def _decode(self) -> SamplePreprocessor:
        return SamplePreprocessor(*self._reading(), self.max_tokens, self.captions_per_image, self.seed, self.requests)

    def _decode_tuple(self) -> TuplePreprocessor:
        needed = getattr(getattr(self.trainer, "lightning_module", None), "needs_target_images", False)
        return TuplePreprocessor(*self._reading(), self.max_tokens, self.target_images, all_shown=needed)

    def _reading(self) -> tuple[ImageReader, PromptTokenizer]:
        """What reads a sample's image, features of the width that is known, and the tokenizer."""
        model = self._model()
        transform = self.transform or (model and model.vision.transform)
        tokenizer = self.tokenizer or (model and model.tokenizer)
        if transform is None or tokenizer is None:
            raise RuntimeError("CC3M needs a transform and a tokenizer: call attach(transform, tokenizer), or use a Trainer")
        check_whole("data.max_tokens", self.max_tokens, len(tokenizer.start()) + 1 + len(tokenizer.ret_ids))  # with a word
        width = getattr(model and model.vision, "width", None)
        return ImageReader(decoding_as(transform, self.decoding), width), tokenizer
