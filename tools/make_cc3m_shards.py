"""CC3M as published, a TSV of caption and address, to webdataset shards: img2dataset fetches, and a report says what came.

    python tools/make_cc3m_shards.py Train_GCC-training.tsv --out data/cc3m/train
    python tools/make_cc3m_shards.py Validation_GCC-1.1.0-Validation.tsv --out data/cc3m/validation

A run that was stopped goes on when the same command is given again. OUT then holds 00000.tar ... (jpg, txt, json),
sizes.json for the loader, report.json and report.md. OUT/download is img2dataset's own: a shard moves out of it once it is
whole; the tables NNNNN.parquet that stay behind say of every address what became of it.

img2dataset lives in an environment of its own, made at first use, since it needs older packages than we do.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import venv
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from subprocess import PIPE, Popen, run
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fromage.checks import ADDRESSES
from fromage.cli.options import fraction, natural, out_folder, positive
from fromage.data.shard_sizes import read_sizes
from fromage.errors import UserError
from fromage.io import as_json, write_files, write_json
from fromage.places import cache_folder

# albumentations dropped later what img2dataset resizes with: every image would be lost
PACKAGES = ["img2dataset==1.47.0", "albumentations==1.4.16"]
PROBE = "import img2dataset, albumentations; albumentations.smallest_max_size"
CALL = "import json, sys, img2dataset; img2dataset.download(**json.loads(sys.argv[1]))"
MARK = "FROMAGE_CC3M"  # in the environment of img2dataset: the folder it writes to
ROWS = 100_000  # pairs written at a time
EXAMPLES = 3  # messages under a cause
CAUSES = {  # what a message says -> its cause; the first that fits
    r"timed? ?out": "no answer in time",
    r"certificate|ssl": "no valid certificate",
    r"temporary failure in name": "name server does not answer",
    r"name or service|getaddrinfo|nodename|no address": "host not found",
    r"refused|reset|unreachable|no route|disconnect|closed|aborted|incomplete|broken pipe": "connection failed",
    r"x-robots-tag": "refused by X-Robots-Tag",
    r"decod|opencv|aspect ratio|image (too|area)": "undecodable image",
    r"url|host|port|codec|control char|label": "unusable address",
}


# --- the pairs asked for ---------------------------------------------------------------------------------------------


@dataclass
class Pairs:
    """The lines of a TSV that are pairs; what is not is counted by cause while it is read."""

    tsv: Path
    left_out: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[dict[str, str]]:
        with self.tsv.open("rb") as lines:
            for line in lines:
                try:
                    caption, url, *_ = [*line.decode("utf-8-sig").strip("\r\n").split("\t"), ""]
                except UnicodeDecodeError:
                    self.left_out["line is not UTF-8"] += 1
                    continue
                if not caption.strip() or not url.strip().startswith(ADDRESSES):
                    self.left_out["line without caption and http address"] += bool(line.strip())
                    continue
                yield {"caption": caption.strip(), "url": url.strip()}


def read_tsv(tsv: Path, table: Path) -> dict[str, Any]:
    """Write a TSV's pairs as Parquet, where no quotation mark in a caption can be misread; returns their counts."""
    pairs, count, schema = Pairs(tsv), 0, pa.schema([("caption", pa.string()), ("url", pa.string())])
    rows = iter(pairs)
    with pq.ParquetWriter(table, schema) as writer:
        while some := list(islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist(some, schema))
            count += len(some)
    if not count:
        raise UserError(f"{tsv} holds no pair: each line is to be a caption, a tab and an http address, without a header")
    return {"pairs": count, "left_out": dict(pairs.left_out)}


# --- the folder ------------------------------------------------------------------------------------------------------


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder."""
    with (folder / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder.parent.parent} is in use by another run: wait for it, or end it") from None
        yield


class Fetch:
    """The state of a fetch, all of it on disk.

    Attributes:
        out: where whole shards, their sizes and the report go.
        work: img2dataset's folder; it takes every *.json in it for the statistics of a finished shard.
        table: the pairs it is given.
        asked: how many these are, what they were read from, and the options that a shard's content depends on.
    """

    def __init__(self, tsv: Path, out: Path, options: dict[str, int]) -> None:
        self.out, self.work = out, out / "download"
        self.table, file = self.work / "input" / "pairs.parquet", self.work / "input" / "asked.json"
        with tsv.open("rb") as data:
            given = {"digest": hashlib.file_digest(data, "blake2b").hexdigest(), "options": options}
        if not file.exists():
            if any(out.glob("*.tar")):
                raise UserError(f"{out} holds shards of another origin: name another folder")
            write_json(file, {"tsv": tsv.name, **given, **read_tsv(tsv, self.table)})
        self.asked: dict[str, Any] = json.loads(file.read_text("utf-8"))
        self.options: dict[str, int] = self.asked["options"]  # per_shard, size, quality
        if self.asked | given != self.asked:
            begun = ", ".join([self.asked["tsv"], *(f"{name} {value}" for name, value in self.options.items())])
            raise UserError(f"{out} was begun with {begun}: give the same to go on, or name another folder")

    @property
    def shards(self) -> int:
        """How many shards there are to be."""
        return -(-self.asked["pairs"] // self.options["per_shard"])

    def finished(self, least: float = 0.0) -> dict[str, dict[str, Any]]:
        """Move whole shards out and record their sizes; returns img2dataset's statistics by shard.

        A shard without readable statistics or tar, or of which less than a share of pairs came, is to be fetched again.
        """
        sizes, found = {}, {}
        for path in sorted(self.work.glob("*_stats.json")):
            name = path.name.replace("_stats.json", ".tar")
            try:
                stats = json.loads(path.read_bytes())
                size = self.move(name)
            except (ValueError, OSError, tarfile.TarError):
                stats, size = {"count": 0}, -1
            if size < least * stats["count"]:
                path.unlink()
                (self.out / name).unlink(missing_ok=True)
            else:
                found[name], sizes[name] = stats, size
        write_json(self.out / "sizes.json", sizes)
        return found

    def move(self, name: str) -> int:
        """Give a shard its place, if it has not got it; returns its pairs. Raises OSError or TarError if it has none."""
        fetched, shard = self.work / name, self.out / name
        if not fetched.exists() and shard.exists() and (size := read_sizes(self.out).get(name)) is not None:
            return size
        if fetched.exists():
            fetched.replace(shard)
        return count_pairs(shard)


def count_pairs(shard: Path) -> int:
    """The pairs of a tar. Raises TarError or OSError where it cannot be read."""
    with tarfile.open(shard) as tar:
        return sum(member.name.endswith(".jpg") for member in tar)


# --- img2dataset -----------------------------------------------------------------------------------------------------


def fault(python: Path) -> str:
    """What keeps img2dataset from running under a Python; nothing if it would."""
    try:
        probe = run([python, "-c", PROBE], capture_output=True, text=True, env=environment(), check=False)
    except OSError as error:
        return error.strerror or str(error)
    return (probe.stderr.strip().splitlines() or ["it fails"])[-1] if probe.returncode else ""


def environment() -> dict[str, str]:
    """The environment of img2dataset; albumentations is not to look for newer versions of itself."""
    return os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}


def find_img2dataset(given: Path | None) -> Path:
    """A Python that has img2dataset: the one given, or that of our own environment, which is made if it is not there."""
    if given:
        if why := fault(given):
            raise UserError(f"{given} cannot run img2dataset ({why}): install {' '.join(PACKAGES)} there, or name no Python")
        return given
    home = cache_folder() / "img2dataset"
    python = home / "bin" / "python"
    if fault(python):
        print(f"making {home} for {' and '.join(PACKAGES)}", file=sys.stderr)
        venv.create(home, clear=True, with_pip=True)
        install = run([python, "-m", "pip", "install", "--quiet", *PACKAGES], stderr=PIPE, text=True, check=False)
        if why := install.stderr.strip() if install.returncode else fault(python):
            shutil.rmtree(home, ignore_errors=True)
            raise UserError(
                f"img2dataset cannot be installed ({why.splitlines()[-1]}): it needs the network and Python 3.12 or older; "
                "where it is installed, name that Python with --img2dataset"
            )
    return python


def end_leftovers(mark: str) -> None:
    """End the processes of img2dataset that a killed run left behind, which may still write; Linux knows them by MARK."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def run_img2dataset(python: Path, fetch: Fetch, settings: dict[str, Any]) -> None:
    """Let img2dataset fetch what is not there yet. It and its processes end with us."""
    size = fetch.options["size"]
    options = settings | {
        **{"url_list": str(fetch.table), "input_format": "parquet", "url_col": "url", "caption_col": "caption"},
        **{"output_folder": str(fetch.work), "output_format": "webdataset", "incremental_mode": "incremental"},
        "number_sample_per_shard": fetch.options["per_shard"],
        **({"resize_mode": "keep_ratio", "image_size": size} if size else {"resize_mode": "no"}),
        **{"resize_only_if_bigger": True, "skip_reencode": True, "encode_quality": fetch.options["quality"]},
    }
    words, marked = [str(python), "-c", CALL, json.dumps(options)], environment() | {MARK: str(fetch.work)}
    child = Popen(words, env=marked, start_new_session=True)
    try:
        code = child.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if code:
        raise UserError(f"img2dataset failed with exit code {code}, see above: the same command goes on where it stopped")


# --- the report ------------------------------------------------------------------------------------------------------


def cause_of(message: str) -> str:
    """The cause of a loss, from what img2dataset says of it."""
    if found := re.search(r"HTTP Error (\d{3})", message):
        code = int(found[1])
        return f"HTTP {code} {HTTPStatus(code).phrase}" if code in [*HTTPStatus] else f"HTTP {code}"
    return next((cause for pattern, cause in CAUSES.items() if re.search(pattern, message, re.IGNORECASE)), "other")


def make_report(fetch: Fetch, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Pairs asked, come, and lost by cause, each with its share of those asked."""
    said = Counter[str]()
    for stats in found.values():
        said.update(stats["status_dict"])
    came, written = sum(read_sizes(fetch.out).values()), said.pop("success", 0)
    causes: dict[str, Counter[str]] = {cause: Counter({cause: n}) for cause, n in fetch.asked["left_out"].items()}
    for message, count in said.items():
        causes.setdefault(cause_of(message), Counter())[message] += count
    causes["fetched, not written"] = Counter({"": written - came})
    causes["not tried yet"] = Counter({"": fetch.asked["pairs"] - sum(stats["count"] for stats in found.values())})
    asked = fetch.asked["pairs"] + sum(fetch.asked["left_out"].values())
    return {
        **{"asked": asked, "came": came, "share": came / asked},
        **{"shards": len(found), "unfinished_shards": fetch.shards - len(found), "options": fetch.options},
        "lost": {
            cause: {"pairs": n, "share": n / asked, "messages": dict(messages.most_common(EXAMPLES))}
            for cause, messages in sorted(causes.items(), key=lambda item: -item[1].total())
            if (n := messages.total()) > 0
        },
    }


def as_table(report: dict[str, Any]) -> str:
    """The report as a table of Markdown."""
    lost = {cause: (row["pairs"], row["share"]) for cause, row in report["lost"].items()}
    rows = {"asked": (report["asked"], 1.0), "came": (report["came"], report["share"])} | lost
    width = max(map(len, rows))
    lines = [f"| {name:{width}} | {pairs:>11,} | {part:>7.2%} |" for name, (pairs, part) in rows.items()]
    head = [f"| {'pairs':{width}} | {'number':>11} | {'share':>7} |", f"|{'-' * (width + 2)}|------------:|--------:|"]
    return "\n".join([*head, *lines, ""])


# --- the command line ------------------------------------------------------------------------------------------------


def make_shards(args: argparse.Namespace) -> None:
    """Fetch, or go on with it; then sizes, report and table."""
    if not args.tsv.is_file():
        raise UserError(f"{args.tsv} is missing: fetch CC3M's TSV from its own page and name it here")
    options = {"per_shard": args.per_shard, "size": 0 if args.original else args.size, "quality": args.quality}
    settings = {"processes_count": args.processes, "thread_count": args.threads}
    settings |= {"timeout": args.timeout, "retries": args.retries}
    held = args.out.resolve() / "download" / "input"
    held.mkdir(parents=True, exist_ok=True)
    with lock(held):
        end_leftovers(str(held.parent))
        fetch = Fetch(args.tsv, args.out.resolve(), options)
        if len(fetch.finished(args.refetch_below)) < fetch.shards:
            python = find_img2dataset(args.img2dataset)
            run_img2dataset(python, fetch, settings)
        report = make_report(fetch, fetch.finished())
        write_files(fetch.out, {"report.json": as_json(report), "report.md": as_table(report).encode()})
    print(as_table(report), end="")
    if report["unfinished_shards"]:
        raise UserError(f"{report['unfinished_shards']} of {fetch.shards} shards are missing: give the same command again")
    if not report["came"]:
        most = next(iter(report["lost"]))
        raise UserError(f"no pair came ({most}): mend that, and give the command again with --refetch-below 1")


def parser() -> argparse.ArgumentParser:
    """The options."""
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root.add_argument("tsv", type=Path, help="lines of caption, tab, address; no header")
    root.add_argument("--out", type=out_folder, required=True, help="folder of the shards")
    root.add_argument("--img2dataset", type=Path, metavar="PYTHON", help="a Python that has it (an own environment is made)")
    root.add_argument("--size", type=positive, default=256, help="pixels of the shortest side, at most (256)")
    root.add_argument("--original", action="store_true", help="keep images as they are; what is no JPEG becomes one")
    root.add_argument("--quality", type=int, choices=range(1, 101), metavar="1..100", default=95, help="of the JPEGs (95)")
    root.add_argument("--per-shard", type=positive, default=5000, help="pairs asked for per shard (5000)")
    root.add_argument("--processes", type=positive, default=os.cpu_count(), help="shards fetched at a time (one per core)")
    root.add_argument("--threads", type=positive, default=64, help="addresses fetched at a time, per process (64)")
    root.add_argument("--timeout", type=positive, default=10, help="seconds to wait for an answer (10)")
    root.add_argument("--retries", type=natural, default=1, help="further attempts at an address (1)")
    again = "fetch shards again of which less than this share came, as after a failure of the network"
    root.add_argument("--refetch-below", type=fraction, default=0.0, metavar="SHARE", help=again)
    return root


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        make_shards(parser().parse_args(argv))
    except (UserError, KeyboardInterrupt) as error:
        print(f"make_cc3m_shards: {error or 'stopped; the same command goes on'}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
