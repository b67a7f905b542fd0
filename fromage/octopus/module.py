"""The Lightning module of Octopus: three training stages, and how each starts from the checkpoint of the one before."""

from __future__ import annotations

from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from fromage.checkpoints.lightning import PREFIX
from fromage.checkpoints.load import read_saved
from fromage.checks import check_real, check_whole
from fromage.config import OctopusConfig
from fromage.errors import UserError
from fromage.octopus.checkpoint import MASKS, check_names, check_run, check_shaped, current_names, current_state, of_stage
from fromage.octopus.decoding import decode, grounded
from fromage.octopus.metrics import box_metrics, mask_areas, mean_percent
from fromage.octopus.model import Octopus
from fromage.octopus.step import GroundingBatch, image_patches, octopus_step, read_prompts
from fromage.training.gather import gathered
from fromage.training.guarded_module import GuardedModule
from fromage.training.layers import checkpoint_blocks
from fromage.training.nonfinite import NonFiniteGuard
from fromage.training.schedule import Schedule


class OctopusModule(GuardedModule):
    """The stages of the paper (section 4.1): 1 visual prefix, on captions; 2 the DETR part; 3 everything and the LM.

    The towers are loaded when the run starts. Checkpoints hold the parameters trained so far, including the language model
    only if it was trained.
    """

    strict_loading = False
    model: Octopus

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 1,
        init: str | None = None,
        activation_checkpointing: bool = False,
        lr: float = 1e-4,
        new_lr: float | None = None,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        nonfinite: Literal["stop", "skip"] = "stop",
        seed: int = 0,
        **model: Any,
    ) -> None:
        """Set model and optimiser.

        Args:
            stage: which parameters are trained: 1 visual prefix; 2 queries, recognizer, index tokens; 3 all and LM.
            init: checkpoint of the stage before, with the trained parameters to start from.
            activation_checkpointing: keep only the inputs, keys and values of the language model's layers; run layers again
                in the backward.
            lr: learning rate of AdamW after warm-up.
            new_lr: learning rate of the parameters outside the language model in stage 3; null for lr.
            weight_decay: weight decay of AdamW.
            warmup_steps: steps over which the learning rate rises from lr / warmup_steps; then it falls to 0 along a cosine.
            nonfinite: on a NaN or infinite loss or gradient: stop the run, or skip the update.
            seed: seed of the trained parameters.
            model: the model's own options, fields of fromage.config.OctopusConfig.
        """
        super().__init__()
        self.config = OctopusConfig.of_options(**model)
        self.save_hyperparameters()
        self.save_hyperparameters(vars(self.config))
        self.h: Any = self.hparams
        check_whole("model.warmup_steps", warmup_steps, 0)
        for name in ("lr", "new_lr", "weight_decay"):
            if self.hparams[name] is not None:
                check_real(f"model.{name}", self.hparams[name], 0, inf)
        check_run(stage, self.config)
        self.guard = NonFiniteGuard(nonfinite == "skip")
        self._metrics: list[tuple[str, dict[str, float]]] = []
        self._taken: set[str] = set()  # names of parameters that earlier stages trained

    @property
    def with_queries(self) -> bool:
        """Whether prompts have object queries."""
        return self.h.stage > 1

    @property
    def trains_masks(self) -> bool:
        """Whether the masks of objects are trained."""
        return self.with_queries and bool(self.h.mask_scale)

    def configure_model(self) -> None:
        """Load the towers, once, and the parameters of the stage before; freeze what this stage does not train."""
        if hasattr(self, "model"):
            return
        with torch.device("cpu"):  # as of FromageModule
            self.model = Octopus.from_config(of_stage(self.config, self.h.stage), self.h.seed)
        if self.h.init:
            self._taken = load_trained(self.model, self.h.init)
        choose_trained(self.model, self.h.stage, whole=not self.h.lora_rank)
        if self.h.activation_checkpointing:
            checkpoint_blocks(self.model.lm)

    def configure_optimizers(self) -> Any:
        """AdamW; linear warm-up, then a cosine to the end of the run. Raises UserError for a run without an end."""
        if self.trainer.estimated_stepping_batches == inf:
            raise UserError("the learning rate falls to 0 at the end of the run: give trainer.max_steps or max_epochs")
        h, steps = self.h, int(self.trainer.estimated_stepping_batches)
        lm = [p for p in self.model.lm.parameters() if p.requires_grad]
        known = {id(p) for p in lm}
        new = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": lm, "lr": h.lr}, {"params": new, "lr": h.lr if h.new_lr is None or h.stage < 3 else h.new_lr}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=h.weight_decay, fused=True)
        scheduler = Schedule(optimizer, h.warmup_steps, decay=max(1, steps - h.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: GroundingBatch, index: int) -> Tensor:
        """Loss of one batch; logs its parts."""
        out = octopus_step(self.model, batch)
        self.guard.see({"answer": out.answer_loss, "detection": out.detection_loss}, batch.keys)
        figures = {"loss": out.loss, "answer_loss": out.answer_loss, "token_accuracy": out.token_accuracy}
        figures |= {f"{name}_loss": value for name, value in out.parts.items()}
        figures["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        named = {f"train/{name}": value for name, value in figures.items()}
        self.log_figures(named, ["train/loss"], batch_size=len(batch.examples))
        return out.loss

    def on_validation_epoch_start(self) -> None:
        """Reset the results of the last validation."""
        self._metrics = []

    def validation_step(self, batch: GroundingBatch | None, index: int) -> None:
        """Losses, and metrics of greedy answers (fromage.octopus.metrics). batch: None where all its images are broken."""
        if batch is None and self.trainer.world_size > 1:  # the others would wait for this device
            raise UserError("a whole batch of data.val cannot be decoded; remove its images, or raise data.val_batch_size")
        if batch is None:
            return
        out = octopus_step(self.model, batch)
        named = {"val/answer_loss": out.answer_loss, "val/token_accuracy": out.token_accuracy, "val/loss": out.loss}
        self.log_dict(named, batch_size=len(batch.examples), sync_dist=True)
        if self.h.stage == 1:
            return
        prefill = read_prompts(self.model, batch, image_patches(self.model, batch))
        room = (self.model.lm.max_length or inf) - max(batch.prompts.lengths)
        longest = int(batch.owners.bincount().max())  # tokens of an answer
        answers = grounded(self.model, prefill, decode(self.model, prefill, max(1, int(min(longest + 1, room)))))
        for example, answer in zip(batch.examples, answers, strict=True):
            figures = box_metrics(answer, example.target_boxes, "" if example.meant else example.words)
            if self.model.masks and len(example.masks) == 1 and example.masks[0]:
                figures["mask_mean_iou"] = mask_areas(answer, example.masks[0]).iou
            self._metrics.append((example.key, figures))

    def on_validation_epoch_end(self) -> None:
        """Means over the validation set, in percent, of the examples of all devices, which may be of other kinds on each.

        Lightning's sampler repeats some examples so that all devices have equally many; each counts once.
        """
        figures = mean_percent([*dict(gathered(self._metrics)).values()])
        self.log_dict({f"val/{name}": value for name, value in figures.items()}, sync_dist=True)
        if "acc_iou50" in figures:
            self.log("val/acc", figures["acc_iou50"], prog_bar=True, sync_dist=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise UserError for a checkpoint of another architecture, and to resume one of another stage."""
        state = {name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()}
        state = current_state(state)
        source, theirs = "the checkpoint to resume from", current_names(checkpoint.get("hyper_parameters", {}))
        check_names(self.model, state, source)
        check_shaped(self.model, theirs, state, source)
        stage = theirs.get("stage", self.h.stage)
        if stage != self.h.stage and self.trainer.state.fn == "fit":
            raise UserError(f"{source}: of stage {stage}, not {self.h.stage}; begin from it by --model.init")
        self._taken |= set(state)
        checkpoint["state_dict"] = {PREFIX + name: value for name, value in state.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the parameters trained in this stage or before, and say whose they are."""
        checkpoint["kind"] = self.model.kind
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad} | self._taken
        state = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name: value for name, value in state if name.removeprefix(PREFIX) in trained}


def choose_trained(model: Octopus, stage: int, whole: bool) -> None:
    """Freeze what a stage does not train. whole: stage 3 trains the language model itself, and not adapters in it."""
    model.visual_prefix.requires_grad_(stage != 2)
    model.index_tokens.requires_grad_(bool(model.num_queries) and stage > 1)
    if model.num_queries:
        model.recognizer.requires_grad_(stage > 1)
        if not model.relay:
            model.recognizer.leave.requires_grad_(False)
        model.queries.requires_grad_(stage > 1)
    if stage == 3 and whole:
        model.lm.hf.requires_grad_(True)


def load_trained(model: Octopus, path: str) -> set[str]:
    """Load the parameters of a checkpoint to start from; returns their names. Raises UserError for another architecture."""
    saved = read_saved(path)
    state = current_state(saved.tensors)
    check_shaped(model, current_names(saved.settings), state, path)
    if "queries" in state and not any(name.startswith(MASKS) for name in state):  # the mask head begins again
        state |= {name: value for name, value in model.state_dict().items() if name.startswith(MASKS)}
    model.load_parameters(state, path)
    return set(state)
