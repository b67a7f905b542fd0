"""Octopus under Lightning: three stages, what each trains, and how a stage takes up the last one's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from fromage.checkpoints.lightning import read_checkpoint
from fromage.errors import UserError
from fromage.models.frozen import check_device
from fromage.models.language_model import Quantized
from fromage.octopus.decoding import decode, grounded
from fromage.octopus.lora import add_low_rank
from fromage.octopus.model import Octopus
from fromage.octopus.step import GroundingBatch, image_patches, octopus_step
from fromage.training.nonfinite import NonFiniteGuard

PREFIX = "model."


class OctopusModule(pl.LightningModule):
    """The stages of the paper: 1 the visual prefix, on captions; 2 the DETR part; 3 all of it and the language model.

    The towers are loaded when the run starts. Checkpoints hold what was trained so far, and the language model only where it
    was trained.
    """

    strict_loading = False
    model: Octopus

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 1,
        init: str | None = None,
        lm: str = "lmsys/vicuna-7b-v1.5",
        vision: str = "ViT-L-14-336",
        vision_weights: str | None = "openai",
        vision_layer: int = -2,
        n: int = 64,
        after: int | None = None,
        c: int = 256,
        decoder_layers: int = 6,
        heads: int = 8,
        relay: bool = True,
        template: str = "{image}{instruction}{queries}{start}",
        low_rank: int = 0,
        dtype: str = "bfloat16",
        random_weights: bool = False,
        quantize: Quantized | None = None,
        lr: float = 1e-4,
        new_lr: float | None = None,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        nonfinite: Literal["stop", "skip"] = "stop",
        seed: int = 0,
    ) -> None:
        """Everything a run needs to know of model and optimiser.

        Args:
            stage: what is trained: 1 the visual prefix, 2 queries, recognizer, pointer, index tokens, 3 all and the LM.
            init: checkpoint of the stage before, whose trained parameters this one starts from.
            lm: causal language model: a name on the Hugging Face hub, a folder, or 'toy'.
            vision: image tower: a name of open_clip, 'local-dir:FOLDER', 'hf-hub:ORG/NAME', or 'toy'.
            vision_weights: open_clip's tag of the pretrained weights, or a file; ignored where vision names a folder.
            vision_layer: layer of the tower whose patches are read; -1 is the last.
            n: object queries; 0 for the sequential counterpart, which spells its boxes.
            after: layers of the language model below the DETR decoder; null for half.
            c: width of the DETR decoder, numbers.
            decoder_layers: its layers.
            heads: its attention heads.
            relay: whether what was recognised takes the queries' places in the top layers.
            template: what stands around {image}, {instruction} and {queries}; {start} is the start token.
            low_rank: rank of adapters in the language model's layers (LoRA, extra [lora]) in stage 3; 0 trains it whole.
            dtype: what frozen towers are held and run in: float32, bfloat16 or float16.
            random_weights: build the towers without weights, for tests and timing.
            quantize: hold the language model's layers in int8 or nf4 (4 bits); needs extra [quant], and low_rank in stage 3.
            lr: learning rate of AdamW after warm-up.
            new_lr: that of what is trained beside the language model in stage 3; null for lr.
            weight_decay: AdamW's decay of weights per step, times the learning rate.
            warmup_steps: steps over which the learning rate rises from zero; then it falls to zero along a cosine.
            nonfinite: what to do about a loss or gradient that is NaN or infinite: stop the run, or skip the update.
            seed: seed of what is trained.
        """
        super().__init__()
        self.save_hyperparameters()
        self.h: Any = self.hparams
        if not n and stage == 2:
            raise UserError("model.stage 2 trains the object queries, and model.n is 0: choose stage 1 or 3")
        if quantize and stage == 3 and not low_rank:
            raise UserError("model.quantize: a quantised language model is trained by adapters only; give model.low_rank")
        self.guard = NonFiniteGuard(nonfinite == "skip", ("answer", "recognition"))
        self._judged: list[dict[str, float]] = []
        self._taken: set[str] = set()  # names of parameters that earlier stages trained

    @property
    def asks(self) -> bool:
        """Whether prompts have object queries."""
        return self.h.stage > 1

    def configure_model(self) -> None:
        """Load the towers, once, and the last stage's parameters; freeze what the stage does not train."""
        if hasattr(self, "model"):
            return
        self.model = from_hyperparameters(self.h)
        if self.h.init:
            self._taken = take_up(self.model, self.h.init)
        self._freeze()

    def _freeze(self) -> None:
        model, stage = self.model, self.h.stage
        model.visual_prefix.requires_grad_(stage != 2)
        model.index.requires_grad_(bool(model.n) and stage > 1)
        if model.n:
            model.recognizer.requires_grad_(stage > 1)
            if not model.relay:
                model.recognizer.leave.requires_grad_(False)
            model.queries.requires_grad_(stage > 1)
            model.pointer.requires_grad_(stage > 1)
        if stage == 3 and not self.h.low_rank:
            model.lm.hf.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        """AdamW; linear warm-up, then a cosine to the end of the run."""
        h, steps = self.h, int(self.trainer.estimated_stepping_batches)
        lm = [p for p in self.model.lm.parameters() if p.requires_grad]
        known = {id(p) for p in lm}
        new = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": lm, "lr": h.lr}, {"params": new, "lr": h.new_lr or h.lr}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=h.weight_decay, fused=True)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / max(1, h.warmup_steps), total_iters=h.warmup_steps)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - h.warmup_steps))
        both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, fall], [h.warmup_steps])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": both, "interval": "step"}}

    def training_step(self, batch: GroundingBatch, index: int) -> Tensor:
        """Loss of one batch; logs its parts."""
        saver: Any = self.trainer.checkpoint_callback
        self.guard.check((saver and (saver.last_model_path or saver.best_model_path)) or "none yet")
        out = octopus_step(self.model, batch)
        self.guard.see((out.answer_loss, out.set_loss), batch.keys)
        many = len(batch.examples)
        self.log("train/loss", out.loss.detach(), prog_bar=True, batch_size=many)
        scalars = {"answer_loss": out.answer_loss, "token_accuracy": out.right}
        scalars |= {f"{name}_loss": value for name, value in out.parts.items()}
        self.log_dict({f"train/{name}": value.detach() for name, value in scalars.items()}, batch_size=many)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return out.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """No update from what is not finite."""
        self.guard.before_update(optimizer, self.global_step)

    def on_train_end(self) -> None:
        """The last losses are looked at too."""
        self.guard.check("the last one", wait=True)

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._judged = []

    def validation_step(self, batch: GroundingBatch, index: int) -> None:
        """Losses, and figures of greedy answers; see fromage.octopus.metrics."""
        from fromage.octopus.metrics import judge

        out = octopus_step(self.model, batch)
        named = {"val/answer_loss": out.answer_loss, "val/token_accuracy": out.right, "val/loss": out.loss}
        self.log_dict(named, batch_size=len(batch.examples), sync_dist=True)
        if self.h.stage == 1:
            return
        patches = image_patches(self.model, batch)
        embeds = self.model.embed(batch.ids, self.model.prefix(patches))
        reading = self.model.read(batch.ids, batch.mask, embeds, patches)
        answers = grounded(self.model, reading, decode(self.model, reading, batch.answers.shape[1] + 1))
        for example, answer in zip(batch.examples, answers, strict=True):
            due = "" if example.meant else "".join(piece for piece in example.answer if isinstance(piece, str))
            self._judged.append(judge(answer, [example.boxes[i] for i in example.meant], due))

    def on_validation_epoch_end(self) -> None:
        """Means over the validation set, in percent."""
        from fromage.octopus.metrics import averaged

        figures = averaged(self._judged)
        self.log_dict({f"val/{name}": value for name, value in figures.items()}, sync_dist=True)
        if "acc_iou50" in figures:
            self.log("val/acc", figures["acc_iou50"], prog_bar=True, sync_dist=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on from another architecture's."""
        check_names(self.model, state_of(checkpoint), "the checkpoint to go on from")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, in this stage or before."""
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad} | self._taken
        state = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name: value for name, value in state if name.removeprefix(PREFIX) in trained}


SETTINGS = (
    "lm", "vision", "vision_weights", "vision_layer", "n", "after", "c", "decoder_layers", "heads", "relay", "template",
    "dtype", "random_weights", "quantize", "seed",
)  # fmt: skip


PARTS = ("queries", "recognizer.", "pointer.", "index.")  # of a model, trained from stage 2 on
LEAVE = "recognizer.leave."  # but this not without relay
SHAPED = ("vision_layer", "n", "after", "c", "decoder_layers", "heads", "relay", "template")  # of what recognises


def from_hyperparameters(h: Any) -> Octopus:
    """A fresh model as the hyperparameters of an OctopusModule describe it, adapters included."""
    model = Octopus.load(**{name: h[name] for name in SETTINGS if name in h})
    if h.get("low_rank") and h["stage"] == 3:
        add_low_rank(model.lm, h["low_rank"])
    return model


def take_up(model: Octopus, path: str) -> set[str]:
    """Put the parameters of a checkpoint into a model; returns their names. Raises UserError for another architecture's."""
    checkpoint = read_checkpoint(path)
    state = state_of(checkpoint)
    theirs = checkpoint["hyper_parameters"]
    if any(name.startswith("recognizer.") for name in state):
        changed = [name for name, value in model.settings.items() if name in SHAPED and theirs.get(name, value) != value]
        if changed:
            was, now = theirs[changed[0]], model.settings[changed[0]]
            raise UserError(f"{path}: of another architecture (model.{changed[0]} {was}, not {now}); give its own settings")
    check_names(model, state, path)
    model.load_state_dict(state, strict=False)
    return set(state)


def state_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters in a checkpoint of Lightning, by their names in the model."""
    return {name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()}


def check_names(model: Octopus, state: Mapping[str, Tensor], path: str) -> None:
    """Raise UserError where a state dict is none of this architecture.

    Stage 1's holds the visual prefix alone; another must hold all that stage 2 trains.
    """
    have = {name: value.shape for name, value in model.state_dict().items()}
    wrong = sorted(name for name, value in state.items() if have.get(name) != value.shape)
    if any(name.startswith("recognizer.") for name in state):
        lacking = (name for name in have.keys() - state.keys() if name.startswith(PARTS))
        wrong += sorted(name for name in lacking if model.relay or not name.startswith(LEAVE))
    if wrong:
        raise UserError(
            f"{path}: of another architecture or version ({wrong[0]}); give the settings it was trained with, or train anew"
        )


def load_octopus(path: str, device: str = "cpu") -> Octopus:
    """The model of a checkpoint of `lightning fit`, in eval mode. Raises UserError where it is none of Octopus's, and for a
    device that is not there.
    """
    check_device(device)
    checkpoint = read_checkpoint(path)
    if "stage" not in checkpoint["hyper_parameters"]:
        raise UserError(f"{path}: not a checkpoint of Octopus; give one of `lightning fit --config octopus_stage3.yaml`")
    h = checkpoint["hyper_parameters"]
    if h["stage"] == 1 and h["n"]:
        raise UserError(f"{path}: of stage 1, which trains no object queries; give a checkpoint of stage 2 or 3")
    model = from_hyperparameters(h)
    take_up(model, path)
    return model.to(device).eval()
