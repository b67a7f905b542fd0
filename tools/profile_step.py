"""Where the time of a training step goes on a card: kernels, launches, waits of the host, share of the card's rate."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from on_device import Save, elapsed, keep_nothing
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fromage.training.meter import Meter, attention_in_parts

PRODUCT = re.compile(r"gemm|gemv|cutlass|nvjet|xmma|wgmma|matmul|splitk|\bmm\b|\bbmm\b|addmm", re.IGNORECASE)
ATTENTION = re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE)
LAUNCH = re.compile(r"^cu(da)?Launch(Cooperative)?Kernel")
WAIT = re.compile(r"^cuda(Stream|Device|Event)Synchronize$|^cudaMemcpy$")
TOP = 12
STEP = "the step"
BUSY = 0.8  # a card that computes less of a step's time waits for the host: the step is launch-bound


class Event(NamedTuple):
    """One entry of a trace: on the device a kernel or a copy, on the host a call or an operation. Microseconds.

    Or a part: a stretch of the step that record_function names, on both.
    """

    name: str
    on_device: bool
    start: float
    taken: float  # of an operation on the host, without those within it
    part: bool = False


def summarise(events: Iterable[Event], seconds: float) -> dict[str, Any]:
    """Figures of one step from its trace.

    seconds: of a step without the profiler, which slows the host down. Where no kernel ran, as on a CPU, operations of the
    host stand for kernels. Calls of the host count within the part named STEP only, since the profiler waits itself.
    """
    events = list(events)
    named = [e for e in events if e.part]
    events = [e for e in events if not e.part]
    spans = [e for e in named if e.name == STEP and not e.on_device]
    begin, end = (spans[0].start, spans[0].start + spans[0].taken) if spans else (0.0, float("inf"))
    calls = [e.name for e in events if not e.on_device and begin <= e.start <= end]
    copies = ("Memcpy", "Memset")
    kernels = [e for e in events if e.on_device and not e.name.startswith(copies)]
    on_card = bool(kernels)
    kernels = kernels or [e for e in events if not e.on_device and e.name.startswith("aten::")]
    total, counts = sum(e.taken for e in kernels) or 1.0, Counter(e.name for e in kernels)
    times = _taken(kernels)
    share = lambda wanted: sum(t for name, t in times.items() if wanted(name)) / total  # noqa: E731
    attention = lambda name: bool(ATTENTION.search(name))  # noqa: E731
    busy = total / 1e6 / seconds if on_card else None
    return {
        "parts": {n: t / 1e6 for n, t in _taken(e for e in named if e.on_device == on_card).items() if n != STEP},
        "kernels": [{"name": n[:90], "calls": counts[n], "share": t / total} for n, t in times.most_common(TOP)],
        "share_of_products": share(lambda name: PRODUCT.search(name) and not attention(name)),
        "share_of_attention": share(attention),
        "launches": sum(bool(LAUNCH.match(name)) for name in calls) if on_card else None,
        "waits": sum(bool(WAIT.match(name)) for name in calls) if on_card else None,
        "kernel_seconds": total / 1e6 if on_card else None,
        "busy_share": busy,
        "launch_bound": None if busy is None else busy < BUSY,
    }


def _taken(events: Iterable[Event]) -> Counter[str]:
    times = Counter[str]()
    for e in events:
        times[e.name] += e.taken
    return times


def traced(step: Callable[[], Any], device: torch.device) -> list[Event]:
    """The trace of a call that has been warmed up."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as prof:
        with record_function(STEP):
            step()
        if gpu:
            torch.cuda.synchronize()
    events = []
    for e in prof.events():
        on_device = e.device_type != DeviceType.CPU
        whole = on_device or e.is_user_annotation
        taken = e.time_range.elapsed_us() if whole else e.self_cpu_time_total
        events.append(Event(e.name, on_device, e.time_range.start, taken, e.is_user_annotation))
    return events


def waits_of(step: Callable[[], Any], device: torch.device) -> list[str] | None:
    """What makes the host wait for the device in a call, in PyTorch's own words; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 8192, rounds: int = 10) -> float:
    """TFLOP/s of a large product of random matrices: the rate that the device can be asked for."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))  # (n, n) each

    def products() -> None:
        for _ in range(rounds):
            a @ b

    products()
    return rounds * 2 * size**3 / elapsed(products, device) / 1e12


def work(step: Callable[[], Any], held: Iterable[torch.Tensor]) -> int:
    """FLOP of a call, counted on its own operations."""
    meter = Meter(held)
    with attention_in_parts():
        meter.run("step", step)
    return meter.flop


def profiled(bench: Any, step: Callable[[], Any], size: int, save: Save = keep_nothing) -> dict[str, Any]:
    """A step of a bench_step.Bench, warmed up here: everything above. size: of the product that gives the card's rate."""
    device = bench.model.device
    for _ in range(2):
        step()
    seconds = min(elapsed(step, device) for _ in range(3))
    report = {"seconds": seconds} | summarise(traced(step, device), seconds)
    save(report)
    waits = waits_of(step, device)
    report |= {"host_synchronisations": None if waits is None else len(waits), "waiting_at": (waits or [])[:TOP]}
    save(report)
    report["card_tflops"] = product_rate(device, bench.model.lm.dtype, size)
    report["flop"] = work(step, [*bench.model.parameters(), *bench.model.buffers()])
    report["tflops"] = report["flop"] / seconds / 1e12
    report["share_of_rate"] = report["tflops"] / report["card_tflops"]
    save(report)
    return report
