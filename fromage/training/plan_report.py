"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from operator import itemgetter
from typing import Any

from fromage.training.plan import Plan


def report(plan: Plan, tflops: float, share: float) -> str:
    """The plan as text. tflops: peak rate of the device; share: the part of it (0 to 1) that training reaches."""
    kept = [
        (f"{name}: {module}", n)
        for name, p in plan.passes.items()
        for module, n in sorted(p.kept.items(), key=itemgetter(1), reverse=True)
        if n >= 2**20
    ]
    within = {f"  of this, {name}": n for name, n in plan.transient.items()}
    each = f" of each of {plan.devices} devices" * (plan.devices > 1)
    lines = [
        plan.heading,
        _row("\nPARAMETERS", "number", "GiB"),
        *(_row(name, f"{n:,}", plan.weights[name]) for name, n in plan.parameters.items()),
        _row("all", f"{sum(plan.parameters.values()):,}", sum(plan.weights.values())),
        _row("trained", f"{plan.trained:,}", plan.trained_bytes),
        _row("\nKEPT FOR THE BACKWARD", "", "GiB"),
        *(_row(name, "", n) for name, n in kept),
        _row("all", "", sum(plan.activations.values())),
        _row("\nPASSES OF A STEP, and what they need beside", "TFLOP", "GiB"),
        *(_row(name, f"{p.flop / 1e12:.3g}", p.transient) for name, p in plan.passes.items()),
        *(_row(name, "", n) for name, n in within.items()),
        _row(f"\nPEAK MEMORY{each}, without the device's libraries", "", "GiB"),
        *(_row(name, "", n) for name, n in plan.peak.items()),
        _row("all", "", sum(plan.peak.values())),
    ]
    return "\n".join([*lines, "", *_work(plan, tflops, share)])


def _row(name: str, cell: str, size: int | str) -> str:
    """A line of a table. size: bytes, or the title of the column."""
    width = 48 + name.startswith("\n")
    return f"{name:{width}}{cell:>16}" + (f"{size:>10}" if isinstance(size, str) else f"{size / 2**30:10.3f}")


def _work(plan: Plan, tflops: float, share: float) -> Iterator[str]:
    steps, each = plan.max_steps, f" on each of {plan.devices} devices" * (plan.devices > 1)
    yield f"WORK  {plan.flop / 1e12:.3g} TFLOP a step{each}, {plan.flop / plan.examples / 1e9:.4g} GFLOP an example" + (
        f", {plan.flop * steps * plan.devices / 1e18:.3g} EFLOP in {steps:,} steps" if steps > 0 else ""
    )
    for part in (1.0, share):
        seconds = plan.seconds(tflops * part)
        hours = f", {seconds * steps / 3600:.2g} h a run" if steps > 0 else ""
        yield f"TIME  {seconds:.2g} s a step{hours}: an estimate, at {part:.0%} of {tflops:g} TFLOP/s"


def as_json(plan: Plan, tflops: float, share: float) -> dict[str, Any]:
    """The plan as JSON values, in bytes, FLOP and seconds."""
    return asdict(plan) | {
        "activations": plan.activations,
        "peak": plan.peak,
        "peak_bytes": sum(plan.peak.values()),
        "flop": plan.flop,
        "flop_per_example": plan.flop / plan.examples,
        "seconds_per_step": {
            "rate_tflops": tflops,
            "full": plan.seconds(tflops),
            f"{share:g}": plan.seconds(tflops * share),
        },
    }
