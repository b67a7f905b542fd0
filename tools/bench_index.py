"""Time the image index of many images against the brute-force product in torch, interleaved in one run.

    python tools/bench_index.py                   # a million embeddings 256 wide, about three minutes on two cores
    python tools/bench_index.py --rows 3300000    # as many as CC3M's
    python tools/bench_index.py --device cuda     # and the brute force on a card beside it
    python tools/bench_index.py --where           # and searches within a filter that 1 % and 50 % of the rows pass
    python tools/bench_index.py --kind auto:small --float32   # the candidates' recall with rows in float32 beside float16

Embeddings of images are not uniform noise: here they are drawn around centres, which are drawn around fewer centres
themselves, and their spread falls off from dimension to dimension. Queries are new draws from the same. The whole search
is timed, with its exact ranking and the images' names, against the matrix product and topk alone.

How it grows from a million to CC3M's 3.3 million: the brute force with N; the rows that a query looks at, N nprobe / lists,
with the root of N at the same nprobe, since lists are 4 sqrt(N); building with N sqrt(N); bytes per vector not at all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import torch
from on_device import Save, device_name, elapsed, keep_nothing

from fromage.data.image_source import Item
from fromage.io import write_json
from fromage.retrieval.ann import lists_kind
from fromage.retrieval.base import ImageIndex
from fromage.retrieval.build import write_index
from fromage.retrieval.faiss_index import FaissIndex
from fromage.retrieval.index_folder import CANDIDATES
from fromage.retrieval.index_spec import FLAT, IndexSpec
from fromage.retrieval.item_table import Embedded, to_batch
from fromage.retrieval.open_index import load_index
from fromage.retrieval.rerank import unit
from fromage.retrieval.table_file import Table

WIDTH, CHUNK, BATCHES = 256, 1 << 16, (1, 256)


class Mixture:
    """Unit rows around centres around centres."""

    def __init__(self, centres: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.spread = (1 + np.arange(WIDTH, dtype=np.float32)) ** -0.5  # per dimension
        themes = self.draw(np.zeros((max(1, centres // 50), WIDTH), np.float32), 1.0)
        self.centres = self.draw(themes[self.rng.integers(len(themes), size=centres)], 0.9)

    def draw(self, around: np.ndarray, distance: float) -> np.ndarray:
        """(n, q) rows, each drawn around its own of (n, q); distance: of the noise, where rows are 1 long."""
        noise = self.rng.standard_normal(around.shape, dtype=np.float32) * self.spread
        rows = around + distance * noise / np.linalg.norm(self.spread)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def rows(self, n: int) -> np.ndarray:
        """(n, q) rows around the centres."""
        return self.draw(self.centres[self.rng.integers(len(self.centres), size=n)], 0.9)


def batches(rows: np.ndarray) -> Iterator[Embedded]:
    """Rows with names for them, as the index takes them."""
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        yield (
            unit(part, "the bench"),
            to_batch([Item(f"https://images.example/{start + i}.jpg") for i in range(len(part))]),
        )


def brute(rows: torch.Tensor, queries: np.ndarray, k: int) -> np.ndarray:
    """(B, k) nearest rows by the whole product, where the rows are."""
    return (torch.from_numpy(queries).to(rows.device) @ rows.T).topk(k).indices.cpu().numpy()


def brute_rates(rows: torch.Tensor, mixture: Mixture, rounds: int, k: int) -> dict[int, float]:
    """Median seconds per query of the whole product alone, at each size of batch, where the rows are."""
    seconds: dict[int, float] = {}
    for size in BATCHES:
        draws = [mixture.rows(size) for _ in range(rounds + 1)]
        times = [elapsed(partial(brute, rows, queries, k), rows.device) for queries in draws]
        seconds[size] = statistics.median(times[1:]) / size  # the first warms up
    return seconds


def on_card(rows: np.ndarray, mixture: Mixture, rounds: int, k: int, device: str) -> dict[str, object]:
    """The brute force with all rows on a device: queries per second, the device's name, bytes that the rows take there."""
    there = torch.from_numpy(rows).to(device)
    rates = {n: round(1 / s, 1) for n, s in brute_rates(there, mixture, rounds, k).items()}
    queries = mixture.rows(64)
    near, known = brute(there, queries, k), brute(torch.from_numpy(rows), queries, k)
    same = float(np.mean([len({*a} & {*b}) / k for a, b in zip(near, known, strict=True)]))
    return {"device": device_name(device), "queries_per_second": rates, "bytes": there.nbytes, "same_as_cpu": same}


def timed(call: Callable[[], object]) -> float:
    """Seconds a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def recall(index: ImageIndex, rows: torch.Tensor, queries: np.ndarray, k: int, where: str = "", every: int = 1) -> float:
    """Share of the true k nearest that are found; where: a filter that each so many-th row passes."""
    found = [{hit.path for hit in hits} for hits in index.search(queries, k, where=where)]
    some = rows[::every].contiguous()
    truth = np.concatenate([brute(some, queries[i : i + 64], k) * every for i in range(0, len(queries), 64)])
    shares = [
        len(names & {f"https://images.example/{i}.jpg" for i in near}) for names, near in zip(found, truth, strict=True)
    ]
    return float(np.mean(shares)) / k


def rates(index: ImageIndex, rows: torch.Tensor, mixture: Mixture, rounds: int, k: int) -> dict[str, dict[int, float]]:
    """Median seconds per query, of both ways at each size of batch, in turns."""
    ways = {"brute": lambda q: brute(rows, q, k), "index": lambda q: index.search(q, k)}
    seconds: dict[str, dict[int, list[float]]] = {way: {size: [] for size in BATCHES} for way in ways}
    for turn in range(rounds + 1):  # the first warms up
        for size in BATCHES:
            queries = mixture.rows(size)
            for way, call in ways.items():
                took = timed(lambda call=call, queries=queries: call(queries)) / size  # type: ignore[misc]
                seconds[way][size] += [took] if turn else []
    return {way: {size: statistics.median(times) for size, times in by.items()} for way, by in seconds.items()}


PASS = {"1 %": ("part = 0", 100), "50 %": ("half = 'even'", 2)}  # filters, and which rows pass: each so many-th


def columns(count: int) -> Table:
    """Metadata that the filters look at."""
    row = np.arange(count)
    keys = pa.array([f"https://images.example/{i}.jpg".encode() for i in row], pa.binary())
    return Table(keys, pa.table({"part": row % 100, "half": np.where(row % 2, "odd", "even")}))


def filtered(index: ImageIndex, rows: torch.Tensor, mixture: Mixture, args: argparse.Namespace, k: int) -> dict[str, object]:
    """Recall within each filter, its time against that of no filter, in turns, and that of the first search with it."""
    ways = {"none": "", **{share: where for share, (where, _) in PASS.items()}}
    first = {
        share: timed(lambda where=where: index.search(mixture.rows(1), k, where=where)) for share, where in ways.items()
    }  # type: ignore[misc]
    seconds: dict[str, dict[int, list[float]]] = {share: {size: [] for size in BATCHES} for share in ways}
    for size in BATCHES:
        for _ in range(args.rounds * (16 if size == 1 else 1)):
            queries = mixture.rows(size)
            for share, where in ways.items():
                seconds[share][size] += [timed(lambda w=where, q=queries: index.search(q, k, where=w))]  # type: ignore[misc]
    middle = {share: {n: statistics.median(times) for n, times in by.items()} for share, by in seconds.items()}
    queries = mixture.rows(args.queries)
    return {
        f"where_{share}": {
            "recall_at_10": round(recall(index, rows, queries, k, *PASS[share]), 4),
            "time_against_no_filter": {n: round(middle[share][n] / middle["none"][n], 2) for n in BATCHES},
            "first_search_ms": round(1e3 * first[share], 2),
        }
        for share in PASS
    }


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", help="FAISS factory string; by default what is recommended for so many rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each way and size of batch")
    parser.add_argument("--queries", type=int, default=512, help="queries the recall is measured with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--where",
        action="store_true",
        help="also search within filters that 1 %% and 50 %% of the rows pass",
    )
    parser.add_argument("--float32", action="store_true", help="also measure the recall with rows in float32 on disk")
    parser.add_argument("--device", help="time the brute force there too, such as cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    if args.kind and args.kind.lower() == FLAT:
        parser.error("--kind flat: is the brute force itself; give an approximate kind")
    return args


def main() -> None:
    """Read the command line, build, measure, print a table and write JSON."""
    args = options()
    report = run(args)
    print("\n".join(f"{name:28} {value}" for name, value in report.items()))
    if args.json:
        write_json(args.json, report)


def run(args: argparse.Namespace, save: Save = keep_nothing) -> dict[str, object]:
    """All figures for the options of `main`; save is given those of the device before the index is built."""
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    mixture = Mixture(max(10, args.rows // 200), args.seed)
    rows = np.concatenate([mixture.rows(min(CHUNK, args.rows - start)) for start in range(0, args.rows, CHUNK)])
    k = min(10, args.rows)
    found = {"on_device": on_card(rows, mixture, args.rounds, k, args.device)} if args.device else {}
    save({"rows": len(rows), **found})
    with tempfile.TemporaryDirectory() as folder:
        return measure(rows, mixture, Path(folder) / "index", args, k) | found


def measure(rows: np.ndarray, mixture: Mixture, folder: Path, args: argparse.Namespace, k: int) -> dict[str, object]:
    """All figures, of an index that is built, saved and opened."""
    kind, tensor, stream = args.kind or lists_kind(len(rows)), torch.from_numpy(rows), batches(rows)
    tables = [columns(len(rows))] if args.where else []
    build = timed(lambda: write_index(folder, stream, IndexSpec(WIDTH, "bench", kind=kind, overwrite=True, tables=tables)))
    index = load_index(folder)
    opening = statistics.median(timed(lambda: load_index(folder)) for _ in range(5))
    seconds = rates(index, tensor, mixture, args.rounds, k)
    size = {path.name: path.stat().st_size / len(rows) for path in folder.iterdir()}
    assert index.candidates
    queries, more = mixture.rows(args.queries), {}
    share = recall(index, tensor, queries, k)
    if args.where:
        more |= filtered(index, tensor, mixture, args, k)
    if args.float32:
        assert isinstance(index, FaissIndex)
        rounded, index.vectors = index.vectors, rows
        more["recall_at_10_float32"] = round(recall(index, tensor, queries, k), 4)
        index.vectors = rounded
    return more | {
        "recall_at_10": round(share, 4),
        "speedup_batch_1": round(seconds["brute"][1] / seconds["index"][1], 1),
        "speedup_batch_256": round(seconds["brute"][256] / seconds["index"][256], 1),
        "bytes_per_vector": round(size[CANDIDATES], 1),  # in memory; the exact rows below stay on disk
        "bytes_per_vector_on_disk": round(sum(size.values()), 1),
        "rows": len(rows),
        "kind": index.kind,
        "setting": index.candidates.setting,
        "oversample": index.candidates.factor,
        "recall_at_10_at_build": index.candidates.recall,
        "build_seconds": round(build, 1),
        "open_seconds": round(opening, 4),
        "queries_per_second": {way: {n: round(1 / s, 1) for n, s in by.items()} for way, by in seconds.items()},
        "threads": args.threads,
    }


if __name__ == "__main__":
    main()
