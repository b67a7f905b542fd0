"""The parts of the GPU kit (tools/gpu_kit.py): each calls a bench of this folder and returns its figures.

A part is given what the run is (Task) and a function that keeps its figures so far. `dry` stands for tiny sizes on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench_generate
import bench_grounding
import bench_index
import bench_octopus
import bench_step
import open_clip  # noqa: F401  (loaded once, before the parts)
import pytest
import torch
from on_device import Save, device_name
from PIL import Image
from profile_step import profiled

from fromage.training.memory_planner import Run, plan
from fromage.training.plan import LM, TOWER, Plan

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "torchvision", "transformers", "pytorch-lightning", "open_clip_torch", "triton", "faiss-cpu", "numpy", "peft"
)  # fmt: skip
TOLERANCE = 0.15  # of `fromage plan` against a card's allocator
PLANNED: dict[str, dict[str, Any]] = {
    "reference": {"step": "reference", "max_tokens": bench_step.MAX_TOKENS},  # to which it pads, whatever a batch has
    "fast": {},
    "stored features": {"stored_features": True},
}


@dataclass
class Task:
    """What a part needs to know of its run.

    Attributes:
        dry: tiny sizes, on a CPU.
        results: what the parts before have found, by their number.
    """

    dry: bool
    results: dict[str, Any]

    @property
    def device(self) -> str:
        """Where it runs. Raises RuntimeError where a card is wanted and there is none."""
        if self.dry:
            return "cpu"
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device; --dry-run needs none")
        return "cuda"

    @property
    def rounds(self) -> int:
        """Timed rounds of each side."""
        return 1 if self.dry else 5


def environment(task: Task, save: Save) -> dict[str, Any]:
    """Versions, the card, its driver and free memory."""
    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine(), "versions": versions()}
    save(found)
    found["device"] = device_name(task.device)
    if task.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        capability = torch.cuda.get_device_capability()
        found |= {"free_bytes": free, "total_bytes": total, "capability": capability, "cuda": torch.version.cuda}
        save(found)
        query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    return found


def versions() -> dict[str, str | None]:
    """Of the packages that figures depend on; None for what is not there."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


class Counted:
    """Plugin of pytest: how many passed, failed and were skipped, kept after each."""

    def __init__(self, save: Save) -> None:
        self.save = save
        self.found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of one test."""
        if report.when == "call" or report.outcome != "passed":
            self.found[report.outcome] += 1
        if report.failed:
            self.found["failures"][report.nodeid] = report.longreprtext[-1500:]
        self.save(self.found)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported counts as a failure."""
        if report.failed:
            self.found["failed"] += 1
            self.found["failures"][report.nodeid] = str(report.longrepr)[-1500:]
            self.save(self.found)


def tests(task: Task, save: Save) -> dict[str, Any]:
    """`pytest -m gpu` over the files that have such tests; the others may need what a bare machine lacks."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if task.dry:  # they are skipped, and collecting them takes long
        files = [path for path in files if path.endswith("test_on_gpu.py")]
    counted = Counted(save)
    if not files:  # pytest without a file would collect all there are
        raise RuntimeError("no file of tests/ has tests marked gpu")
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "setup.cfg")]
    pytest.main([*files, *options, "--continue-on-collection-errors"], plugins=[counted])
    return counted.found


def step(task: Task, save: Save) -> dict[str, Any]:
    """The training step at the paper's setting: see bench_step."""
    with traced_only() if task.dry else nullcontext():
        preset = "tiny" if task.dry else "paper"
        return bench_step.measure(preset, task.device, task.rounds, compile=True, precision=True, save=save)


@contextmanager
def traced_only() -> Iterator[None]:
    """Within, torch.compile traces and differentiates, and generates no code: a C++ compiler takes longer than all else."""
    before = torch.compile
    torch.compile = partial(before, backend="aot_eager")  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before


def planned(task: Task, save: Save) -> dict[str, Any]:
    """`fromage plan` beside the peaks that part 3 measured, each within TOLERANCE or not."""
    measured = task.results.get("3", {})
    if not measured.get("peak_memory_bytes"):
        raise RuntimeError("part 3 has measured no memory in this run; run them together: --only 3,4")
    preset, report = (
        bench_step.PRESETS[measured["preset"]],
        {"tolerance": TOLERANCE, "device": measured["device"], "kinds": {}},
    )
    with tempfile.TemporaryDirectory() as folder:
        bench_step.lm_config(preset).save_pretrained(folder)
        run = Run(
            lm=folder, vision=preset["vision"], dtype=preset["dtype"], batch_size=measured["batch"],
            tokens=measured["mean_caption"] - 1, max_tokens=measured["longest_caption"],
        )  # fmt: skip
        for name in PLANNED.keys() & measured["peak_memory_bytes"].keys():
            counted = plan(Run(**{**vars(run), **PLANNED[name]}))
            report["kinds"][name] = beside(counted, measured["peak_memory_bytes"][name], measured["held_bytes"][name])
            every = report["kinds"].values()
            report["worst"] = {part: max(abs(kind[part]["off"]) for kind in every) for part in ("whole", "above")}
            save(report)
    return report


def beside(counted: Plan, peak: int, held: int) -> dict[str, Any]:
    """Planned and measured bytes, of all and of what is above weights, optimiser and batch; how far apart they are.

    peak: measured above what was held.
    """
    whole = sum(counted.peak.values())
    below = counted.weights[LM] + counted.weights[TOWER] + 4 * counted.trained + 8 * counted.trained + counted.batch
    figures: dict[str, Any] = {}
    for name, ours, theirs in (("whole", whole, peak + held), ("above", whole - below, peak)):
        off = ours / theirs - 1
        figures[name] = {"planned": ours, "measured": theirs, "off": off, "within": abs(off) <= TOLERANCE}
    return figures


def profile(task: Task, save: Save) -> dict[str, Any]:
    """A profile of one fast step at the paper's setting."""
    return profile_of("tiny" if task.dry else "paper", task, save)


def profile_of(preset: str, task: Task, save: Save) -> dict[str, Any]:
    """A profile of one fast step of a preset."""
    bench = bench_step.Bench(preset, task.device)
    batch = bench.batch(0, pixels=True)
    found = {"preset": preset, "device": device_name(task.device)}
    ready, size = bench.step(bench_step.fast_step, batch, False), 256 if task.dry else 8192
    return found | profiled(bench, ready, size, lambda figures: save(found | figures))


def generation(task: Task, save: Save) -> dict[str, Any]:
    """Generation and scoring at the authors' demo setting: see bench_generate."""
    if task.dry:
        bench_generate.NEW, bench_generate.CANDIDATES = 4, 4
    return bench_generate.measure("tiny" if task.dry else "paper", task.device, min(3, task.rounds), True, save)


def index(task: Task, save: Save) -> dict[str, Any]:
    """A million vectors, brute force on the card beside FAISS on the CPU: see bench_index."""
    rows, threads = (3000, 1) if task.dry else (1_000_000, torch.get_num_threads())
    words = ["--rows", str(rows), "--rounds", str(task.rounds), "--threads", str(threads), "--queries", "64"]
    options: argparse.Namespace = bench_index.options([*words, "--device", task.device])
    return bench_index.run(options, save)


def octopus(task: Task, save: Save) -> dict[str, Any]:
    """One step of each stage of Octopus, and answers of 1 and 4 boxes against the sequential counterpart."""
    preset, report = "tiny" if task.dry else "paper", {}

    def keep(name: str, figures: dict[str, Any]) -> None:
        report[name] = figures
        save(report)

    stages = bench_octopus.measure(preset, task.device, task.rounds, partial(keep, "training"))
    keep("training", stages)
    torch.manual_seed(0)
    sizes = {"octopus": bench_grounding.QUERIES, "sequential": 0}
    models = {who: bench_grounding.build(bench_grounding.PRESETS[preset], n, task.device) for who, n in sizes.items()}
    image = Image.effect_noise((640, 480), 64).convert("RGB")
    keep("answers", bench_grounding.measure(models, image, min(3, task.rounds), boxes=(1, 4)))
    return report


def small(task: Task, save: Save) -> dict[str, Any]:
    """SmolLM2's shape: a small model's step time, and whether the card waits for the host."""
    preset = "small tiny" if task.dry else "small"
    found = bench_step.measure(preset, task.device, task.rounds, save=save)
    return found | {"profile": profile_of(preset, task, lambda figures: save(found | {"profile": figures}))}
