"""Turn results of the GPU kit into markdown tables for README and docs.

    python tools/gpu_report.py OUT/results.json [MORE.json ...]

Every run has tables of its own under a line with card, versions, command and commit. A ratio compares two figures of one
run. What a run lacks is named with its cause.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

GIB, KINDS = 2**30, ("reference", "fast", "stored features", "fast, compiled")
CUT = {"running": "cut off while it ran", "not reached": "not reached"}
Figures = dict[str, Any]


def number(value: Any, form: str = ".3g") -> str:
    """A figure for a table; a dash where there is none."""
    return "-" if value is None else format(value, form) if isinstance(value, int | float) else str(value)


def gib(value: Any) -> str:
    """Bytes in GiB."""
    return "-" if value is None else f"{value / GIB:.2f}"


def percent(value: Any) -> str:
    """A share of 1."""
    return "-" if value is None else f"{100 * value:.1f} %"


def ratio(over: Any, under: Any) -> str:
    """How many times, of two figures of one run."""
    return f"{over / under:.2f}" if over and under else "-"


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A markdown table; head: its columns, with | between."""
    columns = [column.strip() for column in head.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment(found: Figures) -> Iterator[str]:
    """Versions and memory."""
    named = {"python": found.get("python"), **found.get("versions", {})}
    yield "Versions: " + ", ".join(f"{name} {version}" for name, version in named.items() if version)
    if "total_bytes" in found:
        free, total = gib(found["free_bytes"]), gib(found["total_bytes"])
        yield f"Driver: {found.get('driver', 'unknown')}; CUDA {found.get('cuda')}; {free} of {total} GiB free at the start"


def tests(found: Figures) -> Iterator[str]:
    """How many passed; which did not."""
    yield f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    for name, text in found["failures"].items():
        yield f"- `{name}`: {text.strip().splitlines()[-1] if text.strip() else 'no text'}"


def step(found: Figures) -> Iterator[str]:
    """Seconds, memory and ratios of the kinds of step."""
    seconds, peaks = found.get("seconds", {}), found.get("peak_memory_bytes", {})
    yield table(
        "step | s/step | examples/s | reference : this | memory above the weights, GiB | of reference's",
        (
            [
                name, number(seconds.get(name)), number(found["batch"] / seconds[name], ".1f"),
                ratio(seconds.get("reference"), seconds[name]), gib(peaks.get(name)),
                percent(peaks[name] / peaks["reference"] if {name, "reference"} <= peaks.keys() else None),
            ]
            for name in KINDS if name in seconds
        ),
    )  # fmt: skip
    rounds = found.get("rounds", {})
    told = ", ".join(f"{name} {count}" for name, count in rounds.items())
    yield f"Preset {found['preset']}, batch {found['batch']}, medians; timed rounds: {told}."
    if "max_rel_grad_error" in found:
        yield f"Largest relative gradient error, fast against reference, same precision: {found['max_rel_grad_error']:.1e}."
    if "max_rel_grad_error_bfloat16" in found:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in found["max_rel_grad_error_bfloat16"].items())
        yield f"In bfloat16 against reference in float32, {found['layers']} layers: {errors}."


def planned(found: Figures) -> Iterator[str]:
    """Planned and measured bytes."""
    rows = (
        [name, what, gib(v["planned"]), gib(v["measured"]), f"{100 * v['off']:+.1f} %", "yes" if v["within"] else "no"]
        for name, kind in found["kinds"].items()
        for what, v in (("whole peak", kind["whole"]), ("above weights, optimiser, batch", kind["above"]))
    )
    yield table(f"step | memory | planned, GiB | measured, GiB | off | within {100 * found['tolerance']:.0f} %", rows)


def profile(found: Figures) -> Iterator[str]:
    """Shares, launches, waits, and the kernels that take most."""
    bound = {None: "-", True: "yes", False: "no"}[found.get("launch_bound")]
    rows = {
        "s/step": number(found.get("seconds")),
        **{f"of it in {name}": number(seconds) for name, seconds in found.get("parts", {}).items()},
        "time in matrix products": percent(found.get("share_of_products")),
        "time in attention": percent(found.get("share_of_attention")),
        "card busy": percent(found.get("busy_share")),
        "launch-bound": bound,
        "launches a step": number(found.get("launches"), "d"),
        "host synchronisations": number(found.get("host_synchronisations"), "d"),
        "TFLOP a step": number(found["flop"] / 1e12) if "flop" in found else "-",
        "TFLOP/s reached": number(found.get("tflops")),
        "TFLOP/s of a large product": number(found.get("card_tflops")),
        "share of that rate": percent(found.get("share_of_rate")),
    }
    yield table("profile | ", rows.items())
    kernels = ([f"`{k['name']}`", str(k["calls"]), percent(k["share"])] for k in found.get("kernels", []))
    yield table("kernel | calls | share", kernels)


def generation(found: Figures) -> Iterator[str]:
    """Tokens per second of each way."""
    rates, static = dict(found["tokens_per_second"]), found.get("static_cache", {})
    if static.get("offered"):
        rates["static cache, CUDA graphs" if static["compiled"] else "static cache, not compiled"] = static[
            "tokens_per_second"
        ]
    whole = rates["whole sequence"]
    yield table("generation | tokens/s | times", ([name, number(r, ".1f"), ratio(r, whole)] for name, r in rates.items()))
    if static and not static.get("offered"):
        yield f"Static cache: not offered ({static['why']})."
    yield f"Scoring answers to a shared prompt: {found['speedup_scoring']:.1f} times. Same tokens: {found['same_tokens']}."


def search(found: Figures) -> Iterator[str]:
    """Queries per second of each way, at both sizes of batch."""
    ways = (
        {"brute force on " + found["on_device"]["device"]: found["on_device"]["queries_per_second"]}
        if "on_device" in found
        else {}
    )
    named = {"brute": "brute force, CPU", "index": f"FAISS {found.get('kind')}, CPU"}
    ways |= {named[way]: rates for way, rates in found.get("queries_per_second", {}).items()}
    sizes = list(next(iter(ways.values()), {}))
    head = " | ".join([f"{found['rows']:,} vectors", *(f"queries/s, {size} at a time" for size in sizes)])
    yield table(head, ([name, *(number(rates[size], ".1f") for size in sizes)] for name, rates in ways.items()))
    if "recall_at_10" in found:
        built = f"{found['threads']} threads; built in {found['build_seconds']} s"
        yield f"Recall at 10 of FAISS: {found['recall_at_10']}; {built}."


def octopus(found: Figures) -> Iterator[str]:
    """A step of each stage; answers of both sides."""
    training, answers = found.get("training"), found.get("answers")
    if training:
        rows = (
            [stage, v.get("failed") or number(v["seconds"]), gib(v.get("peak_memory_bytes")), number(v.get("trained"), ",")]
            for stage, v in training["stages"].items()
        )
        yield table(f"stage, batch {training['batch']} | s/step | memory above the weights, GiB | trained", rows)
    if answers:
        ours, theirs = answers["octopus"], answers["sequential"]
        sides = [
            (name.replace("_", " ") + given.replace("_", " "), theirs[f"seconds{given}"][name], fast)
            for given in ("", "_from_pixels")
            for name, fast in ours[f"seconds{given}"].items()
        ]
        rows = ([name, number(1e3 * fast), number(1e3 * slow), ratio(slow, fast)] for name, slow, fast in sides)
        yield table("answer | Octopus, ms | sequential, ms | times", rows)


def small(found: Figures) -> Iterator[str]:
    """Its steps, and its profile."""
    yield from step(found)
    if "profile" in found:
        yield from profile(found["profile"])


SECTIONS: dict[str, Callable[[Figures], Iterator[str]]] = {
    "1": environment, "2": tests, "3": step, "4": planned, "5": profile, "6": generation, "7": search, "8": octopus,
    "9": small,
}  # fmt: skip


def targets(rows: Iterable[Figures], dry_run: bool = False) -> str:
    """Wanted, found, met or missed; a dry run meets and misses nothing."""
    verdict = {True: "met", False: "missed", None: "not measured"} | ({True: "-", False: "-"} if dry_run else {})
    lines = ([r["target"], r["wanted"], number(r["found"]), verdict[r["met"]]] for r in rows)
    return table("target | wanted | found | ", lines)


def part(key: str, entry: Figures) -> Iterator[str]:
    """One part's heading, what went wrong with it, and what it has found."""
    yield f"### {key}. {entry['name']}"
    if entry["status"] != "done":
        yield f"**{CUT.get(entry['status'], entry['status'])}**" + (f": {entry['error']}" if "error" in entry else "")
    if not entry.get("figures"):
        return
    try:
        yield from list(SECTIONS[key](entry["figures"]))
    except (KeyError, TypeError, ValueError) as error:  # a part that was cut off may lack anything
        yield f"What it left, without {error}:\n\n```json\n{json.dumps(entry['figures'], indent=1)}\n```"


def report(run: Figures) -> str:
    """A run as markdown."""
    parts = run["parts"]
    known = [f["figures"].get("device") for f in parts.values() if isinstance(f.get("figures"), dict)]
    card = next(filter(None, known), "no device on record")
    about = f"`{run['command']}`, commit {run['commit']}, {run['started']}, {run['budget']:g} s"
    lines = [f"## {card}", about]
    if run["dry_run"]:
        lines.append("**A dry run: tiny sizes on a CPU. None of these figures is a result.**")
    lines.append(targets(run["targets"], run["dry_run"]))
    for key, entry in parts.items():
        lines += part(key, entry)
    return "\n\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Read the command line and print the tables; 2 for a file that is none of the kit's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path, help="results.json of a run")
    for file in parser.parse_args(words).json:
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            known = run["kit"]
        except (OSError, ValueError, KeyError, TypeError):
            print(f"{file}: cannot be read as results of tools/gpu_kit.py", file=sys.stderr)
            return 2
        assert known == 1
        print(report(run) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
