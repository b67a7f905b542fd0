"""The command that plans a run: its parameters, memory, work and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from fromage.cli.command import Result
from fromage.config import DType, Quantized
from fromage.errors import UserError


@dataclass(kw_only=True)
class Overrides:
    """What to plan in place of what the configuration says.

    Attributes:
        vision: vision tower (overrides the config)
        dtype: number type of the frozen towers (overrides the config)
        step: training step, fast or reference (overrides the config)
        batch_size: pairs, or for Octopus rows, per step and device (overrides the config)
        max_tokens: tokens of the longest caption, with </s> and all [RET] (overrides the config)
        tokens: tokens of the mean caption, with </s>, without [RET] (default: 13)
        r: [RET] tokens of a caption (overrides the config)
        chunk: examples whose activations exist at one time (overrides the config)
        quantize: number type of the language model's layers (overrides the config)
        activation_checkpointing: compute each layer again in the backward pass (overrides the config)
        stored_features: train on features from `fromage features`, or for Octopus on stored patches
        per_image: Octopus: conversations in a row (overrides the config)
        instruction_tokens: Octopus: tokens of an instruction (default: 12)
        answer_tokens: Octopus: tokens of an answer, with its boxes and </s> (default: 24)
        objects: Octopus: boxes of an answer (default: 1; in stage 1: 0)
        devices: Octopus: how many devices train together (overrides the config)
    """

    checked_later: ClassVar[bool] = True  # together with the configuration
    lm: str | None = None
    vision: str | None = None
    dtype: DType | None = None
    step: str | None = None
    batch_size: int | None = None
    max_tokens: int | None = None
    tokens: float | None = None
    r: int | None = None
    chunk: int | None = None
    quantize: Quantized | None = None
    activation_checkpointing: bool = False
    stored_features: bool = False
    per_image: int | None = None
    instruction_tokens: int | None = None
    answer_tokens: int | None = None
    objects: int | None = None
    devices: int | None = None


def plan(*, config: Sequence[str], overrides: Overrides, device_tflops: float = 150, share: float = 0.5) -> Result:
    """Count a run's parameters, memory, work and time, without weights.

    Args:
        config: configuration, as for `lightning fit`; repeatable; later files override earlier ones
        device_tflops: the device's rate in TFLOP/s; an A6000 in bfloat16 has 150
        share: share of that rate that training is assumed to reach, 0 to 1
    """
    from fromage.octopus import planner as of_octopus
    from fromage.training import memory_planner as of_fromage
    from fromage.training.config_options import check_known, model_of
    from fromage.training.configs import find_config
    from fromage.training.plan_report import as_json, report

    files = [find_config(name) for name in config]
    planners: dict[str, Any] = {"FromageModule": of_fromage, "OctopusModule": of_octopus}
    if (name := model_of(files) or "FromageModule") not in planners:
        told = f"no run of {name} can be planned; choose {' or '.join(planners)}"
        raise UserError(f"configuration {', '.join(config)}: model.class_path: {told}")
    planner = planners[name]
    # a switch is only set
    given = {name: value for name, value in asdict(overrides).items() if value is not None and value is not False}
    check_known(planner.Run, given, config)
    counted = planner.plan(planner.read_run(files, **given))
    return Result(report(counted, device_tflops, share), as_json(counted, device_tflops, share))
