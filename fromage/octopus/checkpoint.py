"""Saved parameters of Octopus: former names, what a checkpoint must hold, and how a model takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from fromage.checkpoints.format import Saved
from fromage.checkpoints.lightning import warn_of_other_towers
from fromage.config import OctopusConfig
from fromage.errors import UserError

if TYPE_CHECKING:
    from fromage.octopus.model import Octopus

ConfigT = TypeVar("ConfigT", bound=OctopusConfig)
RENAMED = {"n": "num_queries", "after": "split_layer", "c": "decoder_width", "low_rank": "lora_rank"}  # in files of 0.1
FORMER_INDEX = "index."  # former prefix of the index tokens' parameters
PARTS = ("queries", "recognizer.", "index_tokens.")  # parameters trained from stage 2 on
LEAVE = "recognizer.leave."  # among them, but only with relay
MASKS = "recognizer.masks."  # among them, but only with masks
# settings that the parameters of stage 2 depend on
SHAPED = ("vision_layer", "num_queries", "split_layer", "decoder_width", "decoder_layers", "heads", "relay", "template")


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file under today's names."""
    former = {RENAMED[name]: value for name, value in settings.items() if name in RENAMED and value is not None}
    return former | {name: value for name, value in settings.items() if name not in RENAMED}


def current_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters under today's names."""
    return {
        "index_tokens." + name.removeprefix(FORMER_INDEX) if name.startswith(FORMER_INDEX) else name: value
        for name, value in state.items()
    }


def of_stage(config: ConfigT, stage: int) -> ConfigT:
    """The model of a stage: adapters are there in stage 3 alone."""
    return config if stage == 3 else replace(config, lora_rank=0)


def check_run(stage: int, config: OctopusConfig) -> None:
    """Raise UserError for a run that no model can have."""
    if stage not in (1, 2, 3):
        raise UserError(f"model.stage {stage}: choose 1, 2 or 3")
    if stage == 2 and not config.num_queries:
        raise UserError("model.stage 2 trains the object queries, and model.num_queries is 0: choose stage 1 or 3")
    if config.quantize and stage == 3 and not config.lora_rank:
        raise UserError("model.quantize: a quantised language model is trained by adapters only; give model.lora_rank")


def upgraded(saved: Saved) -> Saved:
    """Saved parameters and settings under today's names; see Pretrained.upgraded."""
    settings = current_names(saved.settings)
    if "stage" in settings:  # of a run
        if settings["stage"] == 1 and settings["num_queries"]:
            told = "of stage 1, which trains no object queries; give a checkpoint of stage 2 or 3"
            raise UserError(f"{saved.source}: {told}")
        settings |= {} if settings["stage"] == 3 else {"lora_rank": 0}
    return replace(saved, settings=settings, tensors=current_state(saved.tensors))


def check_names(model: Octopus, state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError for parameters of another architecture.

    A checkpoint of stage 1 holds the visual prefix alone; others must hold all parameters of stage 2.
    """
    have = {name: value.shape for name, value in model.state_dict().items()}
    wrong = sorted(name for name, value in state.items() if have.get(name) != value.shape)
    if any(name.startswith("recognizer.") for name in state):
        lacking = (name for name in have.keys() - state.keys() if name.startswith(PARTS))
        wrong += sorted(name for name in lacking if model.relay or not name.startswith(LEAVE))
    if wrong:
        remedy = "give the settings it was trained with, or train again"
        raise UserError(f"{source}: of another architecture or version ({wrong[0]}); {remedy}")


def check_shaped(model: Octopus, theirs: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError where parameters of stage 2 were trained with other settings; theirs: those of the checkpoint.

    Warns where parameters of any stage were trained around other towers.
    """
    warn_of_other_towers(source, theirs, vars(model.config))
    if not any(name.startswith("recognizer.") for name in state):
        return
    usual = {"split_layer": len(model.lm.blocks) // 2}  # of those that are None
    ours = {name: usual.get(name) if value is None else value for name, value in vars(model.config).items()}
    theirs = {name: usual.get(name) if value is None else value for name, value in theirs.items()}
    changed = [name for name, value in ours.items() if name in SHAPED and theirs.get(name, value) != value]
    if changed:
        was, now = theirs[changed[0]], ours[changed[0]]
        raise UserError(f"{source}: of another architecture (model.{changed[0]} {was}, not {now}); give its own settings")
