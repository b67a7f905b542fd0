"""The Lightning module of FROMAGe: step, optimiser, pairing, validation and logging."""

from __future__ import annotations

import random
import time
import warnings
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fromage.checkpoints.lightning import PREFIX, trained_state, warn_of_other_towers
from fromage.config import FromageConfig, ModelConfig, kinds
from fromage.data.batches import Batch
from fromage.data.tuples import TupleBatch
from fromage.errors import UserError
from fromage.generation.generate import caption_images
from fromage.models.fromage import Fromage
from fromage.models.vision.base import TextTower
from fromage.training.fast_composition import fast_composition
from fromage.training.fast_step import fast_step
from fromage.training.guarded_module import GuardedModule
from fromage.training.hyperparameters import COMPOSITION, check
from fromage.training.layers import checkpoint_blocks, compile_blocks
from fromage.training.nonfinite import NonFiniteGuard
from fromage.training.reference_composition import NO_TUPLES, CompositionOutput, reference_composition
from fromage.training.reference_step import reference_step
from fromage.training.schedule import Schedule
from fromage.training.step import LossWeights, StepOutput, freeze_unused, image_features, text_embeddings
from fromage.training.validation import Validation

FREEZING = ("freeze_temperature", "captioning_weight", "retrieval_weight", *COMPOSITION, "pooling")  # decide what is trained


class FromageModule(GuardedModule):
    """FROMAGe under Lightning, with the paper's recipe as defaults.

    The towers are loaded when the run starts (configure_model), so a configuration can be printed and planned
    without them. Checkpoints hold the trained parameters and the optimiser only.
    """

    strict_loading = False
    model: Fromage
    _validation: Validation

    def __init__(
        self,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        warmup_steps: int = 100,
        warmup_from_zero: bool = False,
        decay_steps: int = 0,
        pairing: float = 0.5,
        captioning_weight: float = 1.0,
        captioned_share: float = 1.0,
        retrieval_weight: float = 1.0,
        composition_captioning_weight: float = 0.0,
        composition_retrieval_weight: float = 0.0,
        same_image_negatives: bool = True,
        image_dropout: float = 0.0,
        rescale_ret: bool = True,
        freeze_temperature: bool = False,
        step: Literal["fast", "reference"] = "fast",
        chunk: int = 0,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
        nonfinite: Literal["stop", "skip"] = "stop",
        shown: int = 4,
        seed: int = 0,
        **model: Any,
    ) -> None:
        """Set model and optimiser.

        Args:
            lr: learning rate of Adam after warm-up.
            betas: Adam's decay rates of its two moments.
            eps: Adam's epsilon.
            warmup_steps: steps over which the learning rate rises linearly, from lr / warmup_steps.
            warmup_from_zero: warm up one step later, with a first step of learning rate 0, as the released code does.
            decay_steps: steps of a cosine decay to zero after warm-up; 0 keeps the learning rate constant.
            pairing: probability that the captioning sequences of a batch contain two examples each.
            captioning_weight: weight of the captioning loss; with 0 its pass is not run, and the prefix is
                trained by composition losses alone.
            captioned_share: share of a step's examples that the captioning pass reads, the first ones; below 1 where large
                batches are for the contrastive loss alone. Validation reads all.
            retrieval_weight: weight of the two losses of the retrieval pass; with 0 it is run in validations alone, for
                their figures, and the heads are trained by composition retrieval alone.
            composition_captioning_weight: weight of captioning the target of a tuple after image and condition (MCL); tuples
                are data.train_tuples. With 0 its pass is not run.
            composition_retrieval_weight: weight of finding it: the target image or, with space clip and without such an
                image, CLIP's embedding of the target caption. With 0 its pass is not run.
            same_image_negatives: whether an image that a batch holds twice is a negative of its other caption, as in the
                paper; false where images were packed once for each caption.
            image_dropout: share, 0 to 0.99, of an image's features that the image head is trained without, others in each
                step; against overfitting where images are few. The captioning pass, tuples and evaluations see all.
            rescale_ret: rescale [RET] to the mean norm of the frozen embeddings after every step, as the released code does.
            freeze_temperature: keep the temperature of the contrastive loss at 0.07; in the released bfloat16 run it could
                not move.
            step: how losses are computed: fast, or reference as in the authors' code; the same to rounding.
            chunk: examples whose activations are in memory at a time, with the negatives of the whole batch (GradCache); 0
                for all at once. Only for the fast step.
            activation_checkpointing: keep only the inputs of the language model's layers; run layers again in the backward.
            compile_blocks: compile the language model's layers with torch.compile.
            nonfinite: on a NaN or infinite loss or gradient: stop the run, or skip the update.
            shown: examples whose images are logged per validation.
            seed: seed of the trained parameters and of the pairing.
            model: the model's own options, fields of fromage.config.FromageConfig.
        """
        super().__init__()
        self.config = FromageConfig.of_options(**model)
        self.save_hyperparameters()
        self.save_hyperparameters(vars(self.config))
        self.h: Any = self.hparams
        check(self.h)
        self.guard = NonFiniteGuard(nonfinite == "skip")
        self._clock, self._examples = 0.0, 0  # when figures were logged last, and examples since
        self.sheets: dict[str, Image.Image] = {}  # contact sheets of the last validation, by tag

    def configure_model(self) -> None:
        """Load the towers, once."""
        if not hasattr(self, "model"):
            with torch.device("cpu"):  # Lightning asks for the device; what is read there at the start belongs on the host
                self.model = Fromage.from_config(self.config, self.h.seed)
            freeze_unused(self.model, self.weights, self.h.freeze_temperature)
            if self.h.compile_blocks:
                compile_blocks(self.model.lm)
            if self.h.activation_checkpointing:
                checkpoint_blocks(self.model.lm)

    def configure_optimizers(self) -> Any:
        """Adam over the trained parameters; linear warm-up, then constant or a cosine decay.

        The first step has lr / warmup_steps; with warmup_from_zero, as in the released code, 0, and the second has that.
        """
        h = self.h
        trained = [p for p in self.model.trained().values() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=h.lr, betas=tuple(h.betas), eps=h.eps, fused=True)
        first = 0 if h.warmup_from_zero and h.warmup_steps else 1
        scheduler = Schedule(optimizer, h.warmup_steps, first, h.decay_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def paired(self, step: int) -> bool:
        """Whether a step's captioning sequences contain two examples. It depends on seed and step only, for exact resume."""
        return random.Random(f"{self.h.seed}/{step}").random() < self.h.pairing

    @property
    def weights(self) -> LossWeights:
        """Of the losses."""
        h = self.h
        return LossWeights(
            captioning=h.captioning_weight,
            retrieval=h.retrieval_weight,
            same_image_negatives=h.same_image_negatives,
            composition_captioning=h.composition_captioning_weight,
            composition_retrieval=h.composition_retrieval_weight,
            captioned_share=h.captioned_share if self.training else 1.0,
        )

    def dropout(self, step: int, examples: int, part: int = 0) -> Tensor | None:
        """(B, m) factors of dropout on the image features of a step's retrieval pass: 0, or 1 / (1 - image_dropout).

        They depend on seed, step, its part (under gradient accumulation) and device only, for exact resume. None without
        dropout.
        """
        if not self.h.image_dropout:
            return None
        which = f"{self.h.seed}/{step}/{self.global_rank}/dropout" + f"/{part}" * (part > 0)
        draw = random.Random(which).getrandbits(63)
        numbers = torch.rand(examples, self.model.vision.width, generator=torch.Generator().manual_seed(draw))  # (B, m)
        return (numbers >= self.h.image_dropout) / (1 - self.h.image_dropout)

    def losses(self, batch: Batch, paired: bool, dropout: Tensor | None = None) -> StepOutput:
        """The losses of a batch of pairs, by the configured step."""
        if self.h.step == "reference":
            return reference_step(self.model, batch, paired, self.weights, dropout)
        return fast_step(self.model, batch, paired, self.weights, self.h.chunk, dropout)

    def composition(self, tuples: TupleBatch | None) -> CompositionOutput | None:
        """The losses of a batch of tuples; None where both weigh 0. Raises UserError where the data has none."""
        weights = self.weights
        if not weights.composes:
            return None
        if tuples is None:
            raise UserError(NO_TUPLES)
        tower = self.text_tower if weights.composition_retrieval and self.h.space == "clip" else None
        if self.h.step == "reference":
            return reference_composition(self.model, tuples, weights, tower)
        return fast_composition(self.model, tuples, weights, tower, self.h.chunk)

    @property
    def needs_target_images(self) -> bool:
        """Whether there is nothing to find for a tuple without target image: in a space that is not CLIP's."""
        return self.h.composition_retrieval_weight > 0 and self.h.space != "clip"

    @cached_property
    def text_tower(self) -> TextTower | None:
        """CLIP's, loaded at the first use. A cached property is no submodule, so no checkpoint holds it."""
        return self.model.vision.text_tower()

    def setup(self, stage: str) -> None:
        """Raise UserError, before the towers are loaded, where a loss of tuples is to be trained without any."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        composes = self.weights.composes
        if stage == "fit" and composes and getattr(data, "train_tuples", True) is None:
            raise UserError(NO_TUPLES)
        h, steps = self.h, self.trainer.max_steps
        if stage == "fit" and h.decay_steps and h.warmup_steps + h.decay_steps < steps:
            end = h.warmup_steps + h.decay_steps
            warnings.warn(
                f"model.decay_steps: the learning rate is 0 from step {end} on, and trainer.max_steps is {steps}",
                stacklevel=2,
            )
        if stage == "fit" and not composes and getattr(data, "train_tuples", None) is not None:
            warnings.warn(
                f"data.train_tuples: nothing is learned from them while model.{COMPOSITION[1]} and "
                f"model.{COMPOSITION[0]} are 0",
                stacklevel=2,
            )

    def on_fit_start(self) -> None:
        """Raise UserError where captions may be longer than the language model has positions for."""
        most = getattr(getattr(self.trainer, "datamodule", None), "max_tokens", 0)
        tokens = (2 if self.h.pairing else 1) * (self.h.k + most - self.model.r)  # of a captioning sequence
        if self.weights.composes:  # image, condition, and the target caption or [RET]
            after = most if self.weights.composition_captioning else self.model.r
            tokens = max(tokens, self.h.k + most - self.model.r + after)
        if (longest := self.model.lm.max_length) and max(tokens, most) > longest:
            raise UserError(
                f"data.max_tokens {most}: a sequence may have {max(tokens, most)} tokens, and {self.model.lm.name} has "
                f"positions for {longest}; lower it"
            )

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Loss of one batch; logs its parts."""
        step = self.global_step
        part = index % self.trainer.accumulate_grad_batches
        out = self.losses(batch, self.paired(step), self.dropout(step, len(batch.keys), part))
        composed = self.composition(batch.tuples)
        losses = {"captioning": out.captioning_loss, "text": out.text_loss, "contrastive": out.contrastive_loss}
        keys, loss = batch.keys, out.loss
        if composed is not None and batch.tuples is not None:
            losses["composition captioning"] = composed.captioning_loss
            losses["composition contrastive"] = composed.contrastive_loss
            keys, loss = keys + batch.tuples.keys, loss + composed.loss
            self.log_figures({f"train/composition_{name}": value for name, value in composed.figures().items()})
        self.guard.see(losses, keys)
        figures = self._progress() | {
            "train/loss": loss,
            "train/captioning_loss": out.captioning_loss,
            "train/text_loss": out.text_loss,
            "train/contrastive_loss": out.contrastive_loss,
            "train/caption_accuracy": out.caption_accuracy,
            "train/retrieval_accuracy": out.retrieval_accuracy,
            "train/ret_norm": self.model.ret.input.norm(),
            "train/temperature": 1 / self.model.logit_scale.exp(),
        }
        self.log_figures(figures, ["train/loss", "train/examples_per_second"])
        self._examples += len(batch.keys) * self.trainer.world_size
        return loss

    def optimizer_step(self, *args: Any, **named: Any) -> None:
        """A step of Adam, then rescaling of [RET], before a checkpoint of the step can be saved."""
        super().optimizer_step(*args, **named)
        if self.h.rescale_ret:
            self.model.ret.rescale_()

    def _progress(self) -> dict[str, float]:
        """Learning rate, and examples per second since figures were logged last."""
        figures, now = {"train/lr": self.trainer.optimizers[0].param_groups[0]["lr"]}, time.monotonic()
        if self.figures_due:
            if self._clock:
                figures["train/examples_per_second"] = self._examples / (now - self._clock)
            self._clock, self._examples = now, 0
        return figures

    @property
    def stage(self) -> str:
        """Prefix of the names of logged metrics: test or val."""
        return "test" if self.trainer.testing else "val"

    def on_validation_epoch_start(self) -> None:
        """Begin a validation."""
        self._validation, self._clock = Validation(self.model), 0.0

    def validation_step(self, batch: Batch, index: int, dataloader_idx: int = 0) -> None:
        """Losses of the unpaired step with each image's first caption; embeddings of all captions are kept until the end."""
        out = self.losses(batch, paired=False)
        losses = {"captioning_loss": out.captioning_loss, "text_loss": out.text_loss, "loss": out.loss}
        named = {f"{self.stage}/{name}": value for name, value in losses.items()}
        self.log_dict(named, batch_size=len(batch.keys), sync_dist=True)
        self._validation.add(out, batch)

    def on_validation_epoch_end(self) -> None:
        """Recalls over the validation set; contact sheets for TensorBoard and the report."""
        recalls = self._validation.recalls()
        self.log_dict({f"{self.stage}/{name}": value for name, value in recalls.items()}, sync_dist=True)
        self.log(f"{self.stage}/r1", recalls["t2i_r1"], prog_bar=True, sync_dist=True)
        if self.trainer.is_global_zero and self.h.shown:
            self._show({f"{self.stage}/{name}": sheet for name, sheet in self._validation.sheets(self.h.shown).items()})
        del self._validation  # its embeddings

    def _show(self, sheets: dict[str, Image.Image]) -> None:
        """Keep contact sheets by tag for the report, and give them to a logger that takes images."""
        self.sheets |= sheets
        board: Any = getattr(self.logger, "experiment", None)
        for tag, sheet in sheets.items() if hasattr(board, "add_image") else ():
            board.add_image(tag, np.array(sheet), self.global_step, dataformats="HWC")  # (H, W, 3)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Batch, index: int) -> dict[str, Any]:
        """Keys, greedy captions, and image and text embeddings (B, q), of the first captions."""
        features = image_features(self.model, batch)
        return {
            "keys": batch.keys,
            "captions": caption_images(self.model, features),
            "images": self.model.embed_images(features),
            "texts": text_embeddings(self.model, batch),
        }

    def _fitting(self) -> bool:
        try:
            return self.trainer.state.fn == "fit"
        except RuntimeError:  # there is no trainer
            return False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained parameters only, and say whose they are; see fromage.checkpoints.lightning."""
        checkpoint["kind"] = self.model.kind
        checkpoint["state_dict"] = trained_state(checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise UserError for a checkpoint of another architecture, and to resume one that trained other parameters.

        Warns where it names other towers.
        """
        state, then = checkpoint.get("state_dict", {}), dict(checkpoint.get("hyper_parameters", self.h))
        # of the towers the warning below tells, of k and q the shapes; input_prompt shapes no parameter
        others = {*kinds(ModelConfig), "k", "q", "input_prompt"}
        for name in (name for name in kinds(FromageConfig) if name not in others):
            was = then.get(name, getattr(FromageConfig, name))
            if was != (now := self.h.get(name, was)):
                raise UserError(f"checkpoint: trained with model.{name} {was}, not {now}; give it as it was then")
        warn_of_other_towers("checkpoint", then, self.h)
        self.model.check_trained({name.removeprefix(PREFIX): value for name, value in state.items()})
        states = checkpoint.get("optimizer_states") if self._fitting() else None
        had = sum(len(group["params"]) for group in states[0]["param_groups"]) if states else None
        trains = sum(p.requires_grad for p in self.model.trained().values())
        if had not in (None, trains):
            options = ", ".join(f"model.{name}" for name in FREEZING)
            raise UserError(
                f"checkpoint: {had} parameter tensors were trained, and now {trains} would be; to resume, give {options} "
                "as they were then"
            )
