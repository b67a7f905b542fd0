"""What the benches ask of a device: its name, and how long a call keeps it busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Save = Callable[[dict[str, Any]], None]  # takes the figures so far, so that a run that is cut off leaves them


def keep_nothing(report: dict[str, Any]) -> None:
    """A Save for whoever only wants the figures at the end."""


def device_name(device: torch.device | str) -> str:
    """The card's name, or how many threads a CPU computes with."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def elapsed(call: Callable[[], Any], device: torch.device | str) -> float:
    """Seconds of a call: between two events on the device where there is one, by the clock on a CPU.

    The device is idle at the first event, so time that it waits for the host counts.
    """
    if torch.device(device).type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000  # milliseconds -> seconds
